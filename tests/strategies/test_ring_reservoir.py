"""Ring and reservoir: what lies where, what is drawn from where and when, what is kept beside rows, what is refused."""

from __future__ import annotations

import pytest
import torch

from clplat.objective import Objective
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.ring_reservoir import RingReservoir
from clplat.strategies.toy_run import BATCH, STEPS, ToyRun
from clplat.strategies.world import World
from clplat.streams.batch import CURRENT, REPLAY, Batch


def memory(capacity: int = 10, ring_share: float = 0.4, seed: int = 0, tracks: str | None = None) -> RingReservoir:
    generator = torch.Generator().manual_seed(seed)
    return RingReservoir(capacity=capacity, ring_share=ring_share, generator=generator, world=World(), tracks=tracks)


def numbers(first: int, count: int) -> Batch:
    rows = torch.arange(first, first + count)
    return Batch(inputs=rows.float().unsqueeze(1), targets=rows)


def filled(store: RingReservoir, total: int, part: int = 3) -> RingReservoir:
    for step, first in enumerate(range(0, total, part), start=1):
        store.add(numbers(first, min(part, total - first)), stamp=(step, 0))
    return store


@pytest.mark.parametrize("part", [1, 3, 4, 7, 23])
def test_the_ring_holds_the_latest_rows_and_the_reservoir_only_rows_that_left_it(part: int) -> None:
    store = filled(memory(), 23, part)
    kept = store.rows["targets"].tolist()
    assert sorted(kept[:4]) == [19, 20, 21, 22]
    assert len(set(kept[4:])) == 6 and max(kept[4:]) <= 18
    assert store.rows["inputs"][:, 0].tolist() == kept


def test_the_rows_are_those_of_a_fifo_and_algorithm_r_gone_through_one_by_one() -> None:
    store = filled(memory(seed=3), 40, 1)
    chance, ring, long_term = torch.Generator().manual_seed(3), [], []
    for row in range(40):
        ring.append(row)
        if len(ring) > 4:
            oldest, number = ring.pop(0), row - 4
            draw = torch.rand(1, generator=chance, dtype=torch.float64)
            if number < 6:
                long_term.append(oldest)
            elif (place := int(draw * (number + 1))) < 6:
                long_term[place] = oldest
    assert sorted(store.rows["targets"][:4].tolist()) == ring
    assert store.rows["targets"][4:].tolist() == long_term


def test_every_row_that_left_the_ring_stays_with_the_same_chance() -> None:
    counts, runs = torch.zeros(26), 400
    generator = torch.Generator().manual_seed(7)
    for _ in range(runs):
        store = RingReservoir(capacity=10, ring_share=0.4, generator=generator, world=World())
        counts[filled(store, 30, 5).rows["targets"][4:].long()] += 1
    share = 6 / 26
    deviation = ((counts - runs * share).square() / (runs * share * (1 - share))).sum() * 25 / 26
    assert 7.9 < deviation < 54.9, "chi-square with 25 degrees of freedom, two-sided 0.1 %"


def test_stamps_move_with_their_rows() -> None:
    store = filled(memory(), 23)
    assert (store.stamps[:, 0] == store.rows["targets"] // 3 + 1).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 2), (0.8, 3), (1.0, 4)])
def test_the_share_of_a_draw_comes_from_the_reservoir_and_no_row_comes_twice(share: float, expected: int) -> None:
    store = filled(memory(), 23)
    for _ in range(20):
        drawn = store.draw(4, long_share=share).targets
        assert int((drawn < 19).sum()) == expected
        assert len(drawn.unique()) == 4


def test_before_the_ring_is_full_and_where_one_part_is_empty_the_other_gives_all() -> None:
    store = filled(memory(), 3)
    assert sorted(store.draw(3, long_share=1.0).targets.tolist()) == [0, 1, 2]
    assert set(store.draw(9, long_share=1.0).targets.tolist()) <= {0, 1, 2}


def test_only_rows_that_came_before_the_step_and_before_the_task_are_drawn() -> None:
    store = filled(memory(), 23)
    assert set(store.draw(40, step=7).targets.tolist()) <= set(range(18)), "rows 18, 19, 20 came at step 7"
    store = memory()
    for task in range(3):
        store.add(numbers(4 * task, 4), stamp=(task + 1, task))
    drawn = set(store.draw(90, position=2, long_share=0.0).targets.tolist())
    assert drawn == set(store.rows["targets"][4:].tolist()) and max(drawn) < 8, "the ring holds the current task alone"


def test_the_lowest_loss_and_how_far_losses_rose_are_kept_by_part() -> None:
    store = memory(capacity=4, ring_share=0.5, tracks="slot:me")
    store.add(numbers(0, 2), loss=torch.tensor([1.0, 2.0]))
    store.add(numbers(2, 2), loss=torch.tensor([3.0, float("inf")]))
    assert store.best.tolist() == [3.0, float("inf"), 1.0, 2.0], "the rows of the ring, then those that left it"
    store.measured(torch.tensor([1, 2, 3, 4, 4, 0]), torch.tensor([5.0, 7.0, 0.5, 2.5, 2.25, 9.0]))
    assert store.best.tolist() == [3.0, 7.0, 0.5, 2.0]
    assert store.rises.tolist() == [[2.0, 2.0], [0.75, 3.0]]


def test_a_run_measures_what_it_replays_and_the_sum_is_that_of_its_losses() -> None:
    replay = ExperienceReplay(capacity=12, policy="ring_reservoir", ring_share=0.5, from_task=1)
    replay.track_losses("replay")
    run = ToyRun([replay], Objective, "language")
    lowest: dict[int, float] = {}
    rise = count = 0.0
    for step in range(1, run.length + 1):
        before = replay.buffer.best.clone() if replay.buffer.rows else None
        weights = {name: tensor.clone() for name, tensor in run.architecture.state_dict().items()}
        run.train(step)
        now = run.weights()
        run.architecture.load_state_dict(weights)
        loss = run.context.row_loss(run.architecture(run.mixed), run.mixed).detach().mean(1)
        run.architecture.load_state_dict(now)
        if run.mixed.origin is not None:
            assert before is not None
            mine = run.mixed.origin == REPLAY
            places = run.mixed.extra["slot:replay"][mine] - 1
            rise += float((loss[mine] - before[places]).clamp(min=0).double().sum())
            count += int(mine.sum())
            for place, value in zip(places.tolist(), loss[mine].tolist()):
                lowest[place] = min(value, float(before[place]))
        newest = loss[:BATCH] if run.mixed.origin is None else loss[run.mixed.origin == CURRENT]
        latest = replay.buffer.stamps[:, 0] == step
        assert torch.allclose(replay.buffer.best[latest].sort().values, newest.sort().values[-4:], atol=1e-6)
    assert count > 40
    assert float(replay.buffer.rises[:, 0].sum()) == pytest.approx(rise, rel=1e-5)
    assert float(replay.buffer.rises[:, 1].sum()) == count


def test_tracking_changes_no_weight_and_its_bytes_are_counted() -> None:
    plain = ExperienceReplay(capacity=12, policy="ring_reservoir", from_task=1)
    tracking = ExperienceReplay(capacity=12, policy="ring_reservoir", from_task=1)
    tracking.track_losses("replay")
    runs = [ToyRun([strategy], Objective).train() for strategy in (plain, tracking)]
    for name, tensor in runs[0].weights().items():
        assert torch.equal(tensor, runs[1].weights()[name])
    assert tracking.stored_bytes() == plain.stored_bytes() + 12 * 4
    assert tracking.row_bytes() == plain.row_bytes() + 4


def test_places_of_replayed_rows_are_kept_in_no_buffer() -> None:
    tracking, other = ExperienceReplay(capacity=12, from_task=1), ExperienceReplay(capacity=12, from_task=1)
    tracking.track_losses("replay")
    ToyRun([tracking, other], Objective).train()
    assert len(tracking.buffer.best) == 12
    assert other.buffer.rows.keys() == {"inputs", "targets", "task"}


def test_from_the_past_alone_no_row_of_the_current_task_is_replayed() -> None:
    replay = ExperienceReplay(capacity=16, policy="ring_reservoir", draw_from="past", ring_share=0.5)
    run = ToyRun([replay], Objective)
    for step in range(1, run.length + 1):
        run.train(step)
        position = (step - 1) // STEPS
        if position:
            assert (run.mixed.task[run.mixed.origin == REPLAY] < position).all()
            assert int((run.mixed.origin == REPLAY).sum()) == BATCH


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExperienceReplay(capacity=40, policy="ring_reservoir"), "capacity: 40 rows, more than .* 36 training"),
        (lambda: ExperienceReplay(capacity=0, policy="ring_reservoir"), "give room for at least one row"),
        (lambda: ExperienceReplay(capacity=1, policy="ring_reservoir"), "ring_share: 0.2 of 1 rows are 0; ring and"),
        (lambda: ExperienceReplay(capacity=9, policy="ring_reservoir", ring_share=1.0), "are 9; ring and reservoir"),
        (lambda: ExperienceReplay(capacity=9, policy="ring_reservoir", draw="rounds"), "draw: rounds .* use fresh"),
        (lambda: ExperienceReplay(capacity=9, draw_from="past", draw="rounds"), "draw: rounds .* use fresh"),
        (lambda: ExperienceReplay(capacity=9, draw_from="old"), "draw_from: must be all or past, got 'old'"),
        (lambda: ExperienceReplay(capacity=9, long_share=1.5), "long_share: must lie between 0 and 1, got 1.5"),
    ],
)  # fmt: skip
def test_memories_that_cannot_be_are_refused_by_name_before_training(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyRun([make()], Objective)
