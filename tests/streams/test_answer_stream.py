"""Scores of diagnostic streams: a reader that knows the rule has all right, one that knows less has its share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.base import EvalSet, Stream
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.diagnostic.answer_stream import Answers
from clplat.streams.diagnostic.formal_languages import FormalLanguages
from clplat.streams.diagnostic.needle import ASK, NEEDLE, SingleNeedle
from clplat.streams.diagnostic.recall import MQAR


class Reader:
    """An answerer that gives to each row of tokens the tokens that a rule says, one for each place."""

    def __init__(self, rule: Callable[[list[int]], list[int]], vocab_size: int) -> None:
        self.rule, self.vocab_size = rule, vocab_size

    def logits(self, batch: Batch) -> Tensor:
        said = torch.tensor([self.rule(row) for row in batch.inputs.tolist()])
        return 20.0 * F.one_hot(said, self.vocab_size).float()

    def device(self) -> torch.device:
        return torch.device("cpu")


def scores(test: EvalSet, rule: Callable[[list[int]], list[int]], vocab_size: int) -> dict[str, float]:
    sums = test.scorer.score(Reader(rule, vocab_size), test.data, torch.arange(len(test.data)), 64)  # type: ignore[arg-type]
    return {name: float(total / count) for name, (total, count) in sums.items()}


def made(stream: Stream) -> Stream:
    stream.prepare()
    return stream


def last_value(row: list[int]) -> list[int]:
    """For MQAR of 4 pairs and 2 second values: what the token here was last given, 0 where it was given none."""
    known = dict(zip(row[:12:2], row[1:12:2], strict=True))
    return [known.get(token, 0) for token in row]


def first_value(row: list[int]) -> list[int]:
    known = dict(zip(row[10::-2], row[11::-2], strict=True))
    return [known.get(token, 0) for token in row]


@pytest.fixture(scope="module")
def rewritten() -> MQAR:
    options: dict[str, Any] = {"pairs": [4], "rewritten": [2], "lengths": [32], "vocab_size": 64, "multiples": [4]}
    return made(MQAR(**options, train_rows=10, val_rows=10, test_rows=500))  # type: ignore[return-value]


def test_a_reader_of_the_last_value_has_everything_right_at_any_length(rewritten: MQAR) -> None:
    for test in (rewritten.tasks[0].test, *rewritten.probes):
        found = scores(test, last_value, 64)
        assert found.pop("loss") < 1e-6
        assert found == {"accuracy": 1, "row_accuracy": 1, "rewritten_accuracy": 1, "stale_rate": 0}


def test_a_reader_of_the_first_value_is_wrong_where_there_is_a_second_one(rewritten: MQAR) -> None:
    found = scores(rewritten.tasks[0].test, first_value, 64)
    assert found.pop("loss") == pytest.approx(10, rel=1e-3)
    assert found == {"accuracy": 0.5, "row_accuracy": 0, "rewritten_accuracy": 0, "stale_rate": 1}


def test_a_reader_of_no_keys_has_one_in_as_many_values_right(rewritten: MQAR) -> None:
    found = scores(rewritten.tasks[0].test, lambda row: [row[11]] * len(row), 64)
    # Of six values four still count; the last one written is always among them.
    assert found["accuracy"] == pytest.approx(1 / 4) and found["row_accuracy"] == 0
    blind = scores(rewritten.tasks[0].test, lambda row: [40] * len(row), 64)["accuracy"]
    assert abs(blind - 1 / 32) < 5 * (1 / 32 / 2000) ** 0.5


def test_a_reader_of_needles_finds_every_one_and_a_guess_is_at_chance() -> None:
    stream = made(SingleNeedle(lengths=[32], num_values=8, value_length=2, distractors=1, train_rows=10, test_rows=300))

    def found_behind(row: list[int]) -> list[int]:
        asked = row[row.index(ASK) + 1]
        start = next(n for n, token in enumerate(row) if token == NEEDLE and row[n + 1] == asked)
        return [0] * (len(row) - 2) + row[start + 2 : start + 4]

    for test in (stream.tasks[0].test, *stream.probes):
        found = scores(test, found_behind, stream.spec.num_outputs)
        assert (found["accuracy"], found["row_accuracy"]) == (1, 1)
    guess = scores(stream.tasks[0].test, lambda row: [70] * len(row), stream.spec.num_outputs)
    assert abs(guess["accuracy"] - 1 / 8) < 5 * (7 / 64 / 600) ** 0.5


def test_a_reader_of_one_bit_too_few_is_at_the_chance_of_parity() -> None:
    stream = made(FormalLanguages(languages=["parity"], lengths=[40], train_rows=10, test_rows=200))

    def parity(row: list[int], skipped: int) -> list[int]:
        return [4 + sum(token - 4 for token in row[1 + skipped : t + 1]) % 2 for t in range(len(row))]

    for test in (stream.tasks[0].test, *stream.probes):
        assert scores(test, lambda row: parity(row, 0), 6)["accuracy"] == 1
        assert abs(scores(test, lambda row: parity(row, 1), 6)["accuracy"] - 0.5) < 5 * 0.5 / 200**0.5


def test_rows_that_ask_nothing_count_for_nothing() -> None:
    batch = Batch(inputs=torch.zeros(3, 2, dtype=torch.long), targets=torch.tensor([[1, IGNORE], [IGNORE] * 2, [0, 0]]))
    sums = Answers().batch_sums(Reader(lambda row: [1] * len(row), 2), batch)  # type: ignore[arg-type]
    assert sums["accuracy"].tolist() == [1, 3] and sums["row_accuracy"].tolist() == [1, 2]


def test_stale_answers_are_extra_rows_of_scored_sets_alone(rewritten: MQAR) -> None:
    task = rewritten.tasks[0]
    assert task.train.batch(torch.arange(2)).extra == {}
    plain = MQAR(pairs=[4], lengths=[32], vocab_size=64, train_rows=10, val_rows=10, test_rows=10)
    plain.prepare()
    assert "stale_rate" not in plain.tasks[0].test.scorer.metrics
    assert plain.tasks[0].test.data.batch(torch.arange(2)).extra == {}
