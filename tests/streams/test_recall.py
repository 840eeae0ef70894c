"""Recall streams: every answer is the last value written, nothing else gives it away, sets share no row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from clplat.streams.base import EvalSet, JoinedData
from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.answer_stream import BLANK
from clplat.streams.diagnostic.recall import MQAR, _distances

SMALL: dict[str, Any] = {
    "pairs": [4], "lengths": [32], "vocab_size": 64, "train_rows": 2000, "val_rows": 100, "test_rows": 400,
}  # fmt: skip


def prepared(**options: Any) -> MQAR:
    stream = MQAR(**(SMALL | options))
    stream.prepare()
    return stream


def answers(row: list[int], pairs: int, keys: range) -> tuple[list[int], list[int]]:
    """The definition, on a list of tokens: what each asks for after `pairs` pairs, and what it was first given."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for key, value in zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True):
        first.setdefault(key, value)
        last[key] = value
    assert all(key in keys for key in last) and not any(value in keys for value in [*first.values(), *last.values()])
    asked = [IGNORE] * (2 * pairs) + [last.get(token, IGNORE) for token in row[2 * pairs :]]
    stale = [first[t] if t in last and a != IGNORE and first[t] != a else IGNORE for t, a in zip(row, asked)]
    return asked, stale


@pytest.mark.parametrize("gaps", ["noise", "blank"])
@pytest.mark.parametrize("rewritten", [0, 1, 4])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_key_is_answered_by_the_last_value_written_and_asked_once(part: str, rewritten: int, gaps: str) -> None:
    task = prepared(rewritten=[rewritten], gaps=gaps).tasks[0]
    batch = (task.train if part == "train" else getattr(task, part).data).batch(torch.arange(100))
    for number, (row, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        expected, stale = answers(row, 4 + rewritten, range(1, 32))
        assert targets == expected
        assert sum(target != IGNORE for target in targets) == 4
        assert len(set(row[: 8 + 2 * rewritten : 2])) == 4
        if part != "train" and rewritten:
            assert batch.extra["stale"][number].tolist() == stale
            assert sum(old != IGNORE for old in stale) == rewritten
        assert (BLANK in row) == (gaps == "blank")


def test_a_second_value_comes_anywhere_behind_the_first_one() -> None:
    rows = prepared(rewritten=[1]).tasks[0].train.batch(torch.arange(2000)).inputs
    written = rows[:, :10:2]
    again = (written.unsqueeze(2) == written.unsqueeze(1)).float().triu(1).nonzero()
    pairs = Counter((int(first), int(second)) for _, first, second in again)
    assert len(again) == 2000 and set(pairs) == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert max(abs(count - 200) for count in pairs.values()) < 4 * 200**0.5


def test_no_token_and_no_place_is_a_better_guess_than_chance() -> None:
    batch = prepared(vocab_size=16, train_rows=20_000).tasks[0].train.batch(torch.arange(20_000))
    asked = batch.targets != IGNORE
    answers, rows = batch.targets[asked], asked.nonzero()[:, 0]
    deviation = (1 / 8 * 7 / 8 / len(answers)) ** 0.5
    assert abs(answers.bincount(minlength=16)[8:] / len(answers) - 1 / 8).max() < 5 * deviation
    # Of what a row shows: the value of each pair, and the token before the question.
    for place in (1, 3, 5, 7):
        share = (batch.inputs[rows, place] == answers).double().mean()
        assert abs(share - 1 / 4) < 5 * (3 / 16 / len(answers)) ** 0.5
    ordinal = asked.long().cumsum(1)[asked]
    for number, place in ((1, 1), (1, 7), (4, 1), (4, 7)):
        share = (batch.inputs[rows, place] == answers)[ordinal == number].double().mean()
        assert abs(share - 1 / 4) < 5 * (3 / 16 / 20_000) ** 0.5


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_distances_of_questions_follow_the_power_law(power: float) -> None:
    first, *_ = _distances(50_000, 3, 12, power, torch.Generator().manual_seed(0)).unbind(1)
    weights = torch.arange(1, 13).double() ** (power - 1)
    expected = weights / weights.sum()
    found = first.bincount(minlength=12) / 50_000
    assert bool(((found - expected).abs() < 5 * (expected / 50_000).sqrt()).all())


def test_distances_of_a_row_are_all_different() -> None:
    places = _distances(500, 12, 12, 0.01, torch.Generator().manual_seed(0))
    assert places.sort(1).values.tolist() == [list(range(12))] * 500


def test_no_row_is_in_two_sets() -> None:
    # A small space: 3 · 2 orders of keys, of values, and of questions.
    task = prepared(
        pairs=[2], lengths=[8], vocab_size=8, gaps="blank", train_rows=500, val_rows=5, test_rows=10
    ).tasks[0]  # fmt: skip
    sets = [{tuple(row) for row in data.inputs.tolist()} for data in (task.train, task.val.data, task.test.data)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(sets[0]) > 100


def test_a_space_too_small_for_that_is_refused() -> None:
    with pytest.raises(ValueError, match="val_rows: 1-pairs-4 has too few different rows of 4 tokens"):
        prepared(pairs=[1], lengths=[4], vocab_size=6, gaps="blank", test_rows=1000)


def test_the_seed_draws_the_training_rows_alone() -> None:
    first, again, other = (prepared(seed=seed).tasks[0] for seed in (3, 3, 4))
    assert first.train.digest == again.train.digest != other.train.digest
    assert first.test.data.digest == other.test.data.digest
    assert first.val.data.digest == other.val.data.digest != first.test.data.digest


def test_rows_of_tasks_of_different_lengths_can_stand_in_one_batch() -> None:
    stream = prepared(pairs=[4, 8], lengths=[32, 48])
    batch = JoinedData([task.train for task in stream.tasks]).batch(torch.tensor([0, 1, 2000]))
    assert batch.inputs.shape == batch.targets.shape == (3, 48)
    assert bool((batch.inputs[:2, 32:] == BLANK).all()) and bool((batch.targets[:2, 32:] == IGNORE).all())
    assert [task.test.data.batch(torch.arange(2)).inputs.shape[1] for task in stream.tasks] == [32, 48]


def test_longer_rows_with_as_many_pairs_are_probes() -> None:
    stream = prepared(pairs=[4, 8], multiples=[2, 4])
    sizes = {probe.name: asked(probe) for probe in stream.probes}
    assert sizes == {"4-pairs-32-x2": (64, 4), "4-pairs-32-x4": (128, 4), "8-pairs-32-x2": (64, 8),
                     "8-pairs-32-x4": (128, 8)}  # fmt: skip


def asked(test: EvalSet) -> tuple[int, int]:
    """Tokens of a row, and its questions."""
    batch = test.data.batch(torch.arange(1))
    return batch.inputs.shape[1], int((batch.targets != IGNORE).sum())


def test_tasks_with_own_tokens_share_none_but_blank() -> None:
    stream = prepared(pairs=[4, 4, 4], own_tokens=True, gaps="blank", rewritten=[1])
    assert stream.spec.num_outputs == 1 + 3 * 63
    seen = [set(task.train.inputs.flatten().tolist()) for task in stream.tasks]
    assert all(tokens == {BLANK, *range(1 + 63 * number, 64 + 63 * number)} for number, tokens in enumerate(seen))
    for number, task in enumerate(stream.tasks):
        for row, targets in zip(task.train.inputs[:20].tolist(), task.train.targets[:20].tolist(), strict=True):
            assert targets == answers(row, 5, range(1 + 63 * number, 32 + 63 * number))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "pairs: at least one number"),
        ({"pairs": [0]}, "pairs: at least 1, got 0"),
        ({"rewritten": [5]}, r"rewritten: from 0 to the number of pairs \(4\), got 5"),
        ({"rewritten": [1, 2]}, "rewritten: one value for all tasks, or one for each of the 1"),
        ({"lengths": [15]}, "lengths: 4 pairs, 0 second values and 4 questions take 16 tokens; got 15"),
        ({"vocab_size": 10}, "vocab_size: 4 pairs"),
        ({"power": 0.0}, "power: must be positive"),
        ({"pairs": [4, 4]}, "pairs, rewritten, lengths: two tasks are the same"),
        ({"multiples": [1]}, "multiples: different whole numbers from 2"),
        ({"train_rows": 0}, "train_rows: at least 1"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MQAR(**(SMALL | options))
