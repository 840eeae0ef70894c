"""Delayed-label streams: every label is right, lengths are those of the paper, curricula ask what they say."""

from __future__ import annotations

import itertools

import pytest
import torch

from clplat.streams.base import JoinedData
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.diagnostic.bit_rows import PAD, BitRows, delayed_match, parity
from clplat.streams.diagnostic.delayed_labels import NDelayedMatch, NParity, TrainedHeads

SMALL = {"train_rows": 2000, "val_rows": 50, "test_rows": 50}


def plain_label(name: str, bits: list[int], number: int) -> int:
    """The definition, on a list."""
    if name == "parity":
        return sum(bits[-number:]) % 2
    return int(bits[len(bits) - number] == bits[-1])


def prepared(cls: type = NParity, **options) -> NParity:
    stream = cls(**(SMALL | options))
    stream.prepare()
    return stream


def shown(batch: Batch) -> list[list[int]]:
    """The bits of each row without its padding, which must stand behind them."""
    rows = [[token for token in row if token != PAD] for row in batch.inputs.tolist()]
    assert [row + [PAD] * (batch.inputs.shape[1] - len(row)) for row in rows] == batch.inputs.tolist()
    return rows


@pytest.mark.parametrize(("name", "labels"), [("parity", parity), ("match", delayed_match)])
def test_labels_of_all_short_strings_are_those_of_the_definition(name, labels):
    numbers = torch.tensor([1, 2, 3, 4])
    for length in range(4, 9):
        strings = list(itertools.product([0, 1], repeat=length))
        # Bits behind the end must not matter.
        bits = torch.tensor([[*string, 1, 0, 1] for string in strings])
        found = labels(bits, torch.full((len(strings),), length), numbers)
        expected = [[plain_label(name, list(string), int(n)) for n in numbers] for string in strings]
        assert found.tolist() == expected


@pytest.mark.parametrize("cls", [NParity, NDelayedMatch])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_targets_are_the_labels_of_the_bits_that_a_row_shows(cls, part):
    stream = prepared(cls)
    for task, number in zip(stream.tasks, stream.numbers, strict=True):
        data = task.train if part == "train" else getattr(task, part).data
        asked = [number] if part == "test" else [n for n in stream.numbers if n <= number]
        batch = data.batch(torch.arange(40))
        assert batch.task.tolist() == [task.index] * 40
        for bits, targets in zip(shown(batch), batch.targets.tolist(), strict=True):
            labels = [plain_label(cls.label, bits, n) if n in asked else IGNORE for n in stream.numbers]
            assert targets == labels


def test_a_training_batch_has_one_length_drawn_uniformly_from_n_plus_2_to_4n_plus_2():
    for task, number in zip(prepared().tasks, (2, 3, 4, 5, 6), strict=True):
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1))
        batches = [task.train.batch(rows) for rows in order.split(4)]
        lengths = [{len(bits) for bits in shown(batch)} for batch in batches]
        assert all(len(found) == 1 for found in lengths)
        counts = torch.tensor([found.pop() for found in lengths]).bincount(minlength=4 * number + 3)
        assert counts[: number + 2].sum() == 0
        assert len(counts) == 4 * number + 3
        expected = len(batches) / (3 * number + 1)
        assert bool((counts[number + 2 :] > 0).all())
        # 3N degrees of freedom: four standard deviations above the mean.
        deviation = ((counts[number + 2 :] - expected) ** 2 / expected).sum()
        assert deviation < 3 * number + 4 * (6 * number) ** 0.5


def test_a_row_shows_another_length_in_another_batch():
    data = prepared().tasks[4].train
    lengths = {len(shown(data.batch(torch.tensor([first, 7])))[1]) for first in range(100)}
    assert lengths == set(range(8, 27))


def test_scored_rows_have_lengths_of_their_own_in_rising_order():
    for task, number in zip(prepared(test_rows=1000).tasks, (2, 3, 4, 5, 6), strict=True):
        lengths = [len(bits) for bits in shown(task.test.data.batch(torch.arange(1000)))]
        assert lengths == sorted(lengths)
        assert set(lengths) == set(range(number + 2, 4 * number + 3))


def test_training_bits_of_parity_have_a_share_of_ones_for_each_row_and_all_others_are_fair():
    spread = {}
    for cls in (NParity, NDelayedMatch):
        task = prepared(cls, test_rows=2000).tasks[4]
        for part, data in {"train": task.train, "test": task.test.data}.items():
            assert abs(data.bits.float().mean() - 0.5) < 0.02
            spread[cls.label, part] = float(data.bits.float().mean(1).std())
    # U[0, 1] has the standard deviation 0.289; the mean of 26 fair bits 0.098.
    assert spread["parity", "train"] > 0.28
    assert all(abs(spread[key] - 0.098) < 0.01 for key in spread if key != ("parity", "train"))


def test_the_seed_draws_the_training_rows_alone():
    first, again, other = (prepared(seed=seed).tasks[1] for seed in (3, 3, 4))
    assert first.train.digest == again.train.digest != other.train.digest
    assert first.test.data.digest == other.test.data.digest
    assert first.val.data.digest == other.val.data.digest


def test_two_questions_about_the_same_bits_are_two_sets():
    options = {"task": 0, "width": 10, "one_length": False, "one_head": True}
    bits, lengths = torch.zeros(3, 10, dtype=torch.uint8), torch.full((3,), 8)
    digests = {
        BitRows(bits, lengths, labels=labels, questions=[number], **options).digest
        for labels in (parity, delayed_match)
        for number in (2, 3)
    }
    assert len(digests) == 4


def test_one_head_is_asked_for_every_n_in_the_single_head_curriculum():
    stream = prepared(curriculum="single_head")
    assert stream.spec.heads is None and stream.spec.num_outputs == 2
    for task, number in zip(stream.tasks, stream.numbers, strict=True):
        for data in (task.train, task.val.data, task.test.data):
            batch = data.batch(torch.arange(20))
            assert batch.targets.tolist() == [plain_label("parity", bits, number) for bits in shown(batch)]


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"curriculum": "multi_head"}, [[2], [2, 3], [2, 3, 4], [2, 3, 4, 5]]),
        ({"curriculum": "sliding", "window": 2}, [[2], [2, 3], [3, 4], [4, 5]]),
        ({"curriculum": "sliding", "window": 1}, [[2], [3], [4], [5]]),
    ],
)
def test_a_task_asks_the_heads_of_its_curriculum_and_is_tested_on_its_own(options, trained):
    stream = prepared(last=5, **options)
    assert stream.spec.heads == 4
    for task, numbers in zip(stream.tasks, trained, strict=True):
        for data, asked in ((task.train, numbers), (task.val.data, numbers), (task.test.data, [task.index + 2])):
            known = data.batch(torch.arange(5)).targets != IGNORE
            assert known.tolist() == [[n in asked for n in (2, 3, 4, 5)]] * 5


def test_rows_of_all_tasks_can_stand_in_one_batch():
    stream = prepared()
    joined = JoinedData([task.train for task in stream.tasks])
    batch = joined.batch(torch.arange(0, len(joined), 500))
    assert batch.inputs.shape == (20, 26) and batch.targets.shape == (20, 5)
    assert set(batch.task.tolist()) == {0, 1, 2, 3, 4}


def test_trained_heads_are_scored_together_and_the_newest_alone():
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    targets = torch.tensor([[1, 1, IGNORE], [0, 1, IGNORE]])
    sums = TrainedHeads(newest=1).sums(logits, targets)
    assert sums["accuracy"].tolist() == [2, 4]
    assert sums["newest_accuracy"].tolist() == [1, 2]
    one = TrainedHeads(newest=0).sums(logits[:, 0], targets[:, 0])
    assert one["accuracy"].tolist() == one["newest_accuracy"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 1}, "first, last: N goes from at least 2"),
        ({"first": 5, "last": 4}, "first, last: N goes from at least 2 upwards; got 5 to 4"),
        ({"curriculum": "sliding"}, "window: how many of the newest N"),
        ({"window": 3}, "window: how many of the newest N .* got 3 with 'multi_head'"),
        ({"curriculum": "sliding", "window": 0}, "window: at least the newest N"),
        ({"train_rows": 0}, "train_rows: at least 1"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        NParity(**options)
