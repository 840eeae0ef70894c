"""The needle stream: the answer stands behind the asked key alone, at every depth, and the longer rows are longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.needle import ASK, FIRST, NEEDLE, SingleNeedle

SMALL: dict[str, Any] = {
    "lengths": [32], "num_keys": 8, "num_values": 16, "filler_tokens": 5, "train_rows": 1500,
    "val_rows": 50, "test_rows": 200,
}  # fmt: skip
KEYS, VALUES = range(FIRST, FIRST + 8), range(FIRST + 8, FIRST + 24)


def prepared(**options: Any) -> SingleNeedle:
    stream = SingleNeedle(**(SMALL | options))
    stream.prepare()
    return stream


def needles(row: list[int], value_length: int) -> dict[int, list[int]]:
    """The value of each key, read from a row as a person would."""
    starts = [place for place, token in enumerate(row) if token == NEEDLE]
    found = {row[start + 1]: row[start + 2 : start + 2 + value_length] for start in starts}
    assert len(found) == len(starts), "no key has two needles"
    return found


@pytest.mark.parametrize("filler", ["repeat", "noise", "text"])
@pytest.mark.parametrize(("value_length", "distractors"), [(1, 0), (3, 0), (2, 2)])
def test_the_answer_is_the_value_behind_the_asked_key(filler: str, value_length: int, distractors: int) -> None:
    stream = prepared(filler=filler, value_length=value_length, distractors=distractors, multiples=[4])
    task = stream.tasks[0]
    for data in (task.train, task.val.data, task.test.data, stream.probes[0].data):
        batch = data.batch(torch.arange(50))
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            known = needles(row, value_length)
            asked = row.index(ASK)
            value = known[row[asked + 1]]
            assert len(known) == distractors + 1 and set(known) <= set(KEYS) and set(value) <= set(VALUES)
            assert row[asked + 2 :] == value[:-1]
            assert targets == [IGNORE] * (asked + 1) + value
            others = [t for t in row[:asked] if t not in KEYS and t not in VALUES and t != NEEDLE]
            assert len(others) == asked - (distractors + 1) * (2 + value_length)
            assert all(token >= VALUES.stop for token in others)


def test_test_sets_are_one_two_four_and_eight_times_as_long_as_training_rows() -> None:
    stream = prepared(lengths=[32, 64])
    tests = [*(task.test for task in stream.tasks), *stream.probes]
    assert {test.name: test.data.batch(torch.arange(3)).inputs.shape[1] for test in tests} == {
        "needle-32": 32, "needle-32-x2": 64, "needle-32-x4": 128, "needle-32-x8": 256,
        "needle-64": 64, "needle-64-x2": 128, "needle-64-x4": 256, "needle-64-x8": 512,
    }  # fmt: skip
    assert {task.train.batch(torch.arange(3)).inputs.shape[1] for task in stream.tasks} == {64}


def test_the_needle_lies_at_every_depth_alike() -> None:
    rows = prepared(train_rows=6000).tasks[0].train.inputs
    depths = (rows == NEEDLE).nonzero()[:, 1].bincount()
    assert len(depths) == 32 - 2 - 3 + 1
    assert (depths - 6000 / 28).abs().max() < 5 * (6000 / 28) ** 0.5


def test_with_distractors_any_needle_is_asked_for_alike() -> None:
    rows = prepared(distractors=2, train_rows=6000).tasks[0].train.inputs
    starts = (rows == NEEDLE).nonzero()[:, 1].view(6000, 3)
    keys = rows.gather(1, starts + 1)
    asked = (keys == rows[:, -1:]).long().argmax(1).bincount(minlength=3)
    assert (asked - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5


def test_no_value_is_a_better_guess_than_another() -> None:
    targets = prepared(train_rows=8000, value_length=2).tasks[0].train.targets
    for place in (-1, -2):
        counts = targets[:, place].bincount(minlength=VALUES.stop)[VALUES.start :]
        assert (counts - 500).abs().max() < 5 * 500**0.5


def test_scored_rows_are_cut_from_text_that_training_rows_are_not() -> None:
    stream = prepared(filler="text", lengths=[80], test_rows=100)
    task = stream.tasks[0]

    def pieces(rows: torch.Tensor) -> set[tuple[int, ...]]:
        windows = rows[:, :-2].unfold(1, 40, 1).flatten(0, 1)
        return {tuple(window) for window in windows[(windows >= VALUES.stop).all(1)].tolist()}

    trained, scored = pieces(task.train.inputs), pieces(task.test.data.inputs)
    # What the reference says twice may be in both.
    assert len(trained & scored) < 0.05 * len(scored)


def test_no_row_is_in_two_sets_and_the_seed_draws_the_training_rows_alone() -> None:
    small = {
        "lengths": [7],
        "num_keys": 2,
        "num_values": 2,
        "filler_tokens": 2,
        "train_rows": 300,
        "test_rows": 8,
        "val_rows": 4,
    }
    task = prepared(**small).tasks[0]
    sets = [{tuple(row) for row in data.inputs.tolist()} for data in (task.train, task.val.data, task.test.data)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    first, again, other = (prepared(seed=seed).tasks[0] for seed in (3, 3, 4))
    assert first.train.digest == again.train.digest != other.train.digest
    assert first.test.data.digest == other.test.data.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [5]}, "lengths: different numbers above the 5 tokens of needles and question"),
        ({"lengths": [32, 32]}, "lengths: different numbers"),
        ({"num_keys": 2, "distractors": 2}, "num_keys: at least 3, got 2"),
        ({"num_values": 1}, "num_values: at least 2, got 1"),
        ({"value_length": 0}, "value_length: at least 1"),
        ({"distractors": -1}, "distractors: at least 0"),
        ({"filler_tokens": 0}, "filler_tokens: at least 1"),
        ({"multiples": [2, 2]}, "multiples: different whole numbers from 2"),
        ({"test_rows": 0}, "test_rows: at least 1"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SingleNeedle(**(SMALL | options))


def test_more_filler_text_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples, lengths: rows want .* bytes of filler text"):
        prepared(filler="text", multiples=[20_000], test_rows=1)
