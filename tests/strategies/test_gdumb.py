"""GDumb: what it keeps, what it trains on, and where every task begins."""

from __future__ import annotations

import pytest
import torch

from clplat.objective import Objective
from clplat.strategies.replay import GDumb
from clplat.strategies.toy_run import CLASSES, ROWS, STEPS, TASKS, ToyRun
from clplat.streams.base import Data, Movable


def test_every_class_seen_has_an_equal_share_of_a_full_memory() -> None:
    run = ToyRun([GDumb(capacity=9)], Objective)
    for task in range(TASKS):
        kept = run.train(task * STEPS + 1).strategies[0].buffer.batch().targets.bincount(minlength=CLASSES)
        seen = kept[: 2 * (task + 1)]
        assert kept.sum() == 9 and seen.sum() == 9 and seen.max() - seen.min() <= 1, kept


def test_training_reads_the_rows_that_are_kept_and_no_others() -> None:
    run = ToyRun([GDumb(capacity=9)], Objective)
    for step in range(1, run.length + 1):
        run.train(step)
        data = run.strategies[0].train_data(run.context.task, run.context.past)
        rows = data.batch(torch.arange(len(data)))
        assert isinstance(data, Data) and len(data) == 9 and data.nbytes == run.strategies[0].buffer.nbytes + 9 * 8
        for row, label in zip(run.mixed.inputs, run.mixed.targets):
            assert ((rows.inputs == row).all(1) & (rows.targets == label)).any()


def test_the_rows_move_to_a_device_as_other_data_does() -> None:
    run = ToyRun([GDumb(capacity=9)], Objective).train(1)
    data = run.strategies[0].train_data(run.path[0], ())
    assert isinstance(data, Movable)
    moved = data.to(torch.device("meta"))
    assert moved.batch(torch.arange(2)).inputs.device.type == "meta" and len(moved) == 9
    assert data.batch(torch.arange(2)).inputs.device.type == "cpu"


def test_every_task_begins_with_the_weights_that_the_run_began_with() -> None:
    strategy = GDumb(capacity=9)
    run = ToyRun([strategy], Objective)
    initial = run.weights()
    for task in run.path:
        run.train((task.index + 1) * STEPS)
        assert not all(torch.equal(run.weights()[name], tensor) for name, tensor in initial.items())
        strategy.task_start(task)
        assert all(torch.equal(run.weights()[name], tensor) for name, tensor in initial.items())


def test_what_a_task_ends_with_depends_on_the_rows_kept_alone() -> None:
    ends = []
    for spoil in (False, True):
        run = ToyRun([GDumb(capacity=9)], Objective).train(STEPS)
        run.optimizer.state.clear()  # as the platform's fresh optimizer
        if spoil:
            for parameter in run.architecture.parameters():
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        ends.append(run.train(2 * STEPS).weights())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_whole_task_is_offered_once_and_fits_or_is_sampled() -> None:
    run = ToyRun([GDumb(capacity=2 * ROWS)], Objective)
    assert len(run.train(1).strategies[0].buffer) == ROWS
    assert len(run.train(STEPS + 1).strategies[0].buffer) == 2 * ROWS
    assert len(run.train(2 * STEPS + 1).strategies[0].buffer) == 2 * ROWS
    assert run.strategies[0].buffer.seen == 3 * ROWS


def test_an_architecture_that_has_grown_is_refused() -> None:
    run = ToyRun([GDumb(capacity=9)], Objective).train(STEPS)
    run.architecture.head = torch.nn.Linear(8, CLASSES + 1)
    with pytest.raises(ValueError, match="GDumb: the architecture has grown"):
        run.train()


@pytest.mark.parametrize("options", [{}, {"capacity": 1, "capacity_bytes": 1}])
def test_exactly_one_budget_is_asked_for(options: dict) -> None:
    with pytest.raises(ValueError, match="capacity, capacity_bytes: give exactly one"):
        GDumb(**options)
