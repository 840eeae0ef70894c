"""Which rows a buffer keeps: the law of each policy, and the truth about its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clplat.strategies.buffers import Buffer, Policy
from clplat.strategies.world import World
from clplat.streams.batch import REPLAY, Batch


def buffer(policy: Policy, capacity: int, seed: int = 0) -> Buffer:
    generator = torch.Generator().manual_seed(seed)
    return Buffer(capacity=capacity, policy=policy, generator=generator, world=World())


def samples(numbers: Tensor, labels: Tensor | None = None) -> Batch:
    """Rows that carry their own number as input."""
    return Batch(inputs=numbers[:, None].float(), targets=torch.zeros_like(numbers) if labels is None else labels)


def kept(store: Buffer) -> Tensor:
    return store.rows["inputs"][: len(store), 0].long()


def fill(store: Buffer, labels: Tensor, batch_size: int) -> Buffer:
    for part in torch.arange(len(labels)).split(batch_size):
        store.add(samples(part, labels[part]))
    return store


@pytest.mark.parametrize(("rows", "batch_size"), [(40, 7), (40, 40)])
def test_a_reservoir_keeps_every_row_and_every_pair_with_the_same_chance(rows: int, batch_size: int) -> None:
    capacity, streams = 8, 2000
    store = buffer("reservoir", capacity)
    singles, pairs = torch.zeros(rows), torch.zeros(rows, rows)
    for _ in range(streams):
        store.rows, store.size, store.seen = {}, 0, 0
        held = torch.zeros(rows)
        held[kept(fill(store, torch.zeros(rows, dtype=torch.long), batch_size))] = 1
        assert held.sum() == capacity
        singles += held
        pairs += held[:, None] * held[None, :]
    share = capacity / rows
    # The counts of one stream add up to `capacity`, which takes one degree of freedom: 39 are left.
    deviation = ((singles - streams * share).square() / (streams * share * (1 - share))).sum() * (rows - 1) / rows
    assert 16.3 < deviation < 74.7, "chi-square with 39 degrees of freedom, two-sided 0.1 %"
    together = share * (capacity - 1) / (rows - 1)
    spread = (streams * together * (1 - together)) ** 0.5
    apart = torch.triu(pairs - streams * together, 1)[torch.triu(torch.ones(rows, rows), 1) > 0] / spread
    assert apart.abs().max() < 4.8
    assert 0.85 < apart.square().mean() < 1.15


def test_one_large_batch_fills_a_reservoir_as_single_rows_do_from_the_same_random_numbers() -> None:
    labels = torch.zeros(300, dtype=torch.long)
    one, many = fill(buffer("reservoir", 20), labels, 300), fill(buffer("reservoir", 20), labels, 1)
    assert torch.equal(kept(one), kept(many))


@pytest.mark.parametrize("policy", ["ring", "class_balanced"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_shares_of_classes_are_equal_up_to_what_was_seen(policy: Policy, batch_size: int) -> None:
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 2 + [3] * 30)
    store = buffer(policy, 17)
    for part in torch.arange(len(labels)).split(batch_size):
        store.add(samples(part, labels[part]))
        assert len(store) == min(17, int(part[-1]) + 1)
        seen = labels[: int(part[-1]) + 1].bincount(minlength=4)
        held = labels[kept(store)].bincount(minlength=4)
        assert bool((held <= seen).all())
        short = held[held < seen]
        assert not len(short) or int(held.max()) <= int(short.min()) + 1, "a class that gave rows up has a full share"
    assert sorted(labels[kept(store)].bincount().tolist()) == [2, 5, 5, 5]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_ring_holds_the_latest_rows_of_each_class(batch_size: int) -> None:
    labels = torch.randint(3, (90,), generator=torch.Generator().manual_seed(3))
    held = kept(fill(buffer("ring", 13), labels, batch_size))
    for label in range(3):
        mine = held[labels[held] == label].sort().values
        everything = (labels == label).nonzero().flatten()
        assert len(mine) in (4, 5)
        assert torch.equal(mine, everything[-len(mine) :])


def test_class_balanced_keeps_every_row_of_a_class_with_the_same_chance() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [0] * 10)
    counts, streams = torch.zeros(40), 1500
    for seed in range(streams):
        counts[kept(fill(buffer("class_balanced", 8, seed), labels, 9))] += 1
    for label, rows in ((0, 30), (1, 10)):
        share = 4 / rows
        of_class = counts[labels == label]
        deviation = ((of_class - streams * share).square() / (streams * share * (1 - share))).sum() * (rows - 1) / rows
        low, high = {30: (10.2, 60.7), 10: (1.0, 29.7)}[rows]
        assert low < deviation < high, "chi-square with rows − 1 degrees of freedom, two-sided 0.1 %"


def test_of_rows_with_a_priority_of_their_own_each_class_keeps_the_lowest() -> None:
    store, labels = buffer("class_balanced", 6), torch.arange(12) % 2
    order = torch.tensor([5, 0, 3, 4, 1, 5, 0, 1, 2, 3, 4, 2]).double()
    store.add(samples(torch.arange(12), labels), priority=order)
    assert sorted(kept(store).tolist()) == [1, 4, 6, 7, 8, 11]
    store.add(samples(torch.arange(12, 16), torch.full((4,), 2)), priority=torch.tensor([1.0, 3.0, 0.0, 2.0]))
    assert sorted(kept(store).tolist()) == [1, 4, 6, 7, 12, 14]


def test_token_rows_are_balanced_over_tasks() -> None:
    store = buffer("class_balanced", 9)
    for task, rows in enumerate((50, 20, 10)):
        tokens = torch.zeros(rows, 6, dtype=torch.long)
        store.add(Batch(inputs=tokens, targets=tokens, task=torch.full((rows,), task)))
    assert store.rows["task"].bincount().tolist() == [3, 3, 3]


def test_token_rows_of_a_hidden_task_cannot_be_balanced() -> None:
    tokens = torch.zeros(4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="policy: ring needs the task"):
        buffer("ring", 2).add(Batch(inputs=tokens, targets=tokens))


def test_rows_come_back_as_they_went_in_with_types_and_extra_fields() -> None:
    tokens = torch.arange(24).view(4, 6)
    row = Batch(
        inputs=tokens, targets=tokens - 100, task=torch.arange(4), segment_ids=tokens // 3, answer=tokens % 2 == 0,
        extra={"logits": torch.randn(4, 3)},
    )  # fmt: skip
    store = buffer("reservoir", 4)
    store.add(row.with_origin(REPLAY, 0.5))
    back = store.draw(4)
    back = back.rows(back.task.argsort())
    assert back.origin is None and back.weight is None
    for name, tensor in row.tensors().items():
        assert back.tensors()[name].dtype == tensor.dtype
        assert torch.equal(back.tensors()[name], tensor), name


def test_nbytes_counts_the_rows_kept_and_not_the_room_for_more() -> None:
    store = buffer("reservoir", 100)
    assert store.nbytes == 0
    tokens = torch.zeros(3, 6, dtype=torch.long)
    store.add(Batch(inputs=tokens, targets=tokens))
    assert store.nbytes == 3 * (6 * 4 + 6 * 4)


def test_a_draw_repeats_no_row_while_there_are_enough_and_says_nothing_of_the_order_of_storage() -> None:
    store = fill(buffer("reservoir", 10), torch.zeros(10, dtype=torch.long), 10)
    drawn = store.draw(10).inputs[:, 0].long()
    assert sorted(drawn.tolist()) == list(range(10))
    assert len(store.draw(25)) == 25
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[store.draw(3).inputs[:, 0].long()] += 1
    assert ((counts - 600).square() / (600 * 0.7)).sum() * 0.9 < 27.9, "chi-square, 9 degrees of freedom, 0.1 %"


def test_a_stored_and_loaded_buffer_goes_on_as_the_first_one() -> None:
    for policy in ("reservoir", "ring", "class_balanced"):
        labels = torch.arange(60) % 4
        whole = fill(buffer(policy, 11), labels, 6)
        first = fill(buffer(policy, 11), labels[:30], 6)
        second = buffer(policy, 11)
        second.generator.set_state(first.generator.get_state())
        second.load_state_dict(first.state_dict(), torch.device("cpu"))
        for part in torch.arange(30, 60).split(6):
            second.add(samples(part, labels[part]))
        assert torch.equal(kept(second), kept(whole)), policy


def test_tasks_whose_rows_have_other_fields_are_refused_by_name() -> None:
    store = buffer("reservoir", 10)
    store.add(samples(torch.arange(2)))
    with pytest.raises(ValueError, match="segment_ids"):
        store.add(samples(torch.arange(2)).replaced(segment_ids=torch.zeros(2, 1, dtype=torch.long)))


@pytest.mark.parametrize("count", [4, 5, 13])
def test_in_rounds_every_row_comes_once_before_one_comes_again(count: int) -> None:
    store = fill(buffer("reservoir", 12), torch.zeros(12, dtype=torch.long), 12)
    drawn = torch.cat([store.draw(count, rounds=True).inputs[:, 0] for _ in range(12)]).long()
    rounds = drawn[: len(drawn) // 12 * 12].view(-1, 12)
    assert torch.equal(rounds.sort(1).values, torch.arange(12).expand_as(rounds))
    assert len({tuple(part.tolist()) for part in rounds}) > 1


def test_a_restored_buffer_goes_on_with_its_round() -> None:
    store = fill(buffer("reservoir", 12), torch.zeros(12, dtype=torch.long), 12)
    seen = store.draw(5, rounds=True).inputs[:, 0].long()
    restored = buffer("reservoir", 12, seed=9)
    restored.load_state_dict(store.state_dict(), torch.device("cpu"))
    rest = restored.draw(7, rounds=True).inputs[:, 0].long()
    assert sorted(torch.cat([seen, rest]).tolist()) == list(range(12))


def test_a_grown_memory_begins_a_new_round() -> None:
    store = fill(buffer("reservoir", 12), torch.zeros(6, dtype=torch.long), 6)
    store.draw(3, rounds=True)
    store.add(samples(torch.arange(6, 12)))
    assert sorted(store.draw(12, rounds=True).inputs[:, 0].long().tolist()) == list(range(12))
