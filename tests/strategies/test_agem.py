"""A-GEM: the projection against its equation, what it remembers, and two processes against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from projections import assert_no_gradient_is_made_up, gradient

from clplat.objective import Objective
from clplat.strategies.contract import check_strategy
from clplat.strategies.projection import AGEM
from clplat.strategies.toy_run import ROWS, STEPS, TASKS, Kind, ToyRun
from clplat.strategies.world import World

WHOLE = {"patterns_per_task": ROWS, "sample_size": ROWS}
"""All of the first task is remembered, and all that is remembered is drawn."""


@pytest.mark.parametrize("kind", ["classify", "language"])
def test_agem_keeps_the_contract(kind: Kind) -> None:
    check_strategy(lambda: AGEM(patterns_per_task=4, sample_size=3), Objective, off={"sample_size": 0}, kind=kind)


def at_second_task(direction: float) -> tuple[ToyRun, torch.Tensor, torch.Tensor]:
    """A run in its second task with a gradient that agrees (1) or disagrees (-1) with that of the first task."""
    run = ToyRun([AGEM(**WHOLE)], Objective).train(STEPS)
    rows = run.path[0].train.batch(torch.arange(ROWS))
    loss = F.cross_entropy(run.architecture(rows).logits, rows.targets)
    reference = torch.autograd.grad(loss, list(run.architecture.parameters()))
    noise = torch.Generator().manual_seed(3)
    for parameter, part in zip(run.architecture.parameters(), reference):
        parameter.grad = direction * part + 0.05 * torch.randn(part.shape, generator=noise)
    return run, gradient(run), torch.cat([part.flatten() for part in reference])


def test_a_gradient_against_the_memory_loses_exactly_that_part() -> None:
    run, before, reference = at_second_task(-1.0)
    assert torch.dot(before, reference) < 0
    run.strategies[0].gradient()
    expected = before - torch.dot(before, reference) / torch.dot(reference, reference) * reference
    assert torch.allclose(gradient(run), expected, atol=1e-6)
    assert torch.dot(gradient(run), reference).abs() < 1e-5 * reference.square().sum()


def test_a_gradient_that_agrees_with_the_memory_keeps_every_bit() -> None:
    run, before, reference = at_second_task(1.0)
    assert torch.dot(before, reference) > 0
    run.strategies[0].gradient()
    assert torch.equal(gradient(run), before)


def test_weights_that_got_no_gradient_get_none_by_projection() -> None:
    run, _, _ = at_second_task(-1.0)
    assert_no_gradient_is_made_up(run)


def test_frozen_weights_and_a_reference_of_zero_do_no_harm() -> None:
    run, before, _ = at_second_task(-1.0)
    run.context.loss = lambda output, batch: output.logits.sum() * 0
    run.strategies[0].gradient()
    assert torch.equal(gradient(run), before)
    next(run.architecture.parameters()).requires_grad = False
    run.strategies[0].gradient()


def test_the_memory_holds_rows_of_every_task_trained_on_and_none_of_another() -> None:
    run = ToyRun([AGEM(patterns_per_task=5, sample_size=2)], Objective)
    memory = run.strategies[0].memory
    for task in range(TASKS):
        run.train((task + 1) * STEPS)
        assert memory.rows["task"][: len(memory)].bincount().tolist() == [5] * (task + 1)


def test_the_loss_on_earlier_tasks_rises_less_than_without() -> None:
    risen = []
    for strategies in ([], [AGEM(patterns_per_task=ROWS, sample_size=2 * ROWS)]):
        run = ToyRun(strategies, Objective).train(STEPS)
        rows = run.path[0].train.batch(torch.arange(ROWS))
        before = F.cross_entropy(run.architecture(rows).logits, rows.targets).item()
        risen.append(F.cross_entropy(run.train().architecture(rows).logits, rows.targets).item() - before)
    assert risen[1] < 0.7 * risen[0], risen


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patterns_per_task": 0, "sample_size": 1}, "patterns_per_task"),
     ({"patterns_per_task": 1, "sample_size": -1}, "sample_size")],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AGEM(**options)


def test_rows_that_processes_cannot_share_equally_are_refused() -> None:
    with pytest.raises(ValueError, match="AGEM.sample_size: .* multiple of 2"):
        ToyRun([AGEM(patterns_per_task=4, sample_size=3)], Objective, world=World(rank=0, size=2))


def test_two_processes_remember_and_project_as_one_that_draws_the_same_rows(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("agem_replica.py"))
    running = [subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["end"], second["end"]) and all(map(torch.equal, first["reference"], second["reference"]))
    alone = ToyRun([AGEM(patterns_per_task=6, sample_size=4)], Objective).train(STEPS)
    (strategy,) = alone.strategies
    rows = first["memory"]["memory"]["rows"]["inputs"]
    assert len(rows) == 6 and torch.equal(rows, strategy.state_dict()["memory"]["rows"]["inputs"])
    alone.architecture.load_state_dict(first["weights"])
    alone.context.generator.set_state(first["random"])
    reference = strategy.reference_gradient(list(alone.architecture.parameters()), 4)
    for part, expected in zip(first["reference"], reference):
        assert torch.allclose(part, expected, atol=1e-6)
