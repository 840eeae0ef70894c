"""SI and RWalk: path, importance and penalty against their formulas, written out step by step in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from studies import run_folder, study
from torch import Tensor

from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.objective import Objective
from clplat.strategies.base import Strategy
from clplat.strategies.path_integral import SI, RWalk
from clplat.strategies.toy_run import STEPS, TASKS, ToyRun
from clplat.strategies.weights import flat_gradients, flat_parameters


def in_doubles(*strategies: Strategy, rate: float = 0.02) -> ToyRun:
    run = ToyRun(strategies, Objective)
    run.architecture.double()
    run.optimizer.param_groups[0]["lr"] = rate
    for task in run.path:
        task.train.inputs = task.train.inputs.double()
    return run


def one_step(run: ToyRun) -> tuple[Tensor, Tensor, Tensor]:
    """Train one step; the weights before it, the task loss's gradient there, and Δθ."""
    before = flat_parameters(run.architecture).detach()
    rows = run._rows(run.path[run.context.step // STEPS])
    loss = run.context.loss(run.architecture(rows), rows)
    slope = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(run.architecture.parameters()))])
    run.train(run.context.step + 1)
    return before, slope, flat_parameters(run.architecture).detach() - before


def test_si_weighs_each_weight_by_the_fall_of_the_task_loss_along_its_path() -> None:
    si = SI(strength=2.0, damping=1e-3)
    run = in_doubles(si)
    importance, negative = torch.zeros(len(flat_parameters(run.architecture)), dtype=torch.float64), 0
    for _ in range(TASKS):
        walked = [one_step(run) for _ in range(STEPS)]
        path = -sum(slope * moved for _, slope, moved in walked)
        total = sum(moved for _, _, moved in walked)
        importance += path.clamp(min=0) / (total.square() + 1e-3)
        negative += int((path < 0).sum())
        assert torch.allclose(si.importance, importance, rtol=1e-9, atol=1e-12)
        assert torch.allclose(si.anchor, walked[0][0] + total, rtol=1e-12)
    assert negative
    with torch.no_grad():
        for parameter in run.architecture.parameters():
            parameter += 0.1
    moved = flat_parameters(run.architecture) - si.anchor
    assert torch.allclose(si.penalty(None, None), 2.0 * (importance * moved.square()).sum(), rtol=1e-9)


def test_the_gradient_of_the_penalty_is_no_part_of_the_path() -> None:
    si = SI(strength=50.0, damping=1e-3)
    run = in_doubles(si).train(STEPS + 3)
    pull, start = si.pull(flat_parameters(run.architecture).detach()), si.path.clone()
    _, slope, moved = one_step(run)
    assert pull.abs().max() > 0.1 * slope.abs().max()
    assert torch.allclose(si.path - start, -slope * moved, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(si.path - start, -(slope + pull) * moved, rtol=1e-2, atol=1e-14)


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    for strategy in (SI(strength=3.0), RWalk(strength=3.0, interval=2)):
        run = in_doubles(strategy).train(STEPS + 2)
        run.optimizer.zero_grad()
        strategy.penalty(None, None).backward()
        pull = strategy.pull(flat_parameters(run.architecture).detach())
        assert pull.abs().max() > 0
        assert torch.allclose(flat_gradients(run.architecture), pull, rtol=1e-12)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_rwalk_is_the_scaled_fisher_and_the_scaled_score_of_the_path(interval: int) -> None:
    strategy = RWalk(strength=0.5, alpha=0.8, interval=interval)
    run = in_doubles(strategy)
    eps = torch.finfo(torch.float64).eps
    fisher, average, negative = None, None, 0
    for task in range(TASKS):
        walked = [one_step(run) for _ in range(STEPS)]
        score = torch.zeros_like(walked[0][0])
        fall, way = torch.zeros_like(score), torch.zeros_like(score)
        for number, (_, slope, moved) in enumerate(walked, start=1):
            fisher = slope.square() if fisher is None else 0.8 * slope.square() + 0.2 * fisher
            fall, way = fall - slope * moved, way + moved
            if (task * STEPS + number) % interval == 0 or number == STEPS:
                score = score + fall / (0.5 * fisher * way.square() + eps)
                fall, way = torch.zeros_like(score), torch.zeros_like(score)
        average = score if average is None else (average + score) / 2
        expected = fisher / fisher.max() + average.clamp(min=0) / average.max()
        negative += int((average < 0).sum())
        assert torch.allclose(strategy.importance, expected, rtol=1e-6, atol=1e-9)
        assert torch.allclose(strategy.anchor, walked[-1][0] + walked[-1][2], rtol=1e-12)
    assert negative or interval == STEPS


@pytest.mark.parametrize("make", [lambda: SI(strength=1.0), lambda: RWalk(strength=1.0)])
def test_two_half_batches_accumulated_are_one_batch(make, tmp_path: Path) -> None:
    kind = type(make())
    states = []
    for name, batch_size, accumulate in (("whole", 16, 1), ("halves", 8, 2)):
        data = study(
            strategies={"it": {"class_path": kind.__name__, "init_args": {"strength": 0.1}}},
            architecture__init_args={"hidden_sizes": [16]}, training__budget={"steps": 8},
            training__batch_size=batch_size, training__accumulate=accumulate, training__clip_norm=0.5,
        )  # fmt: skip
        folder = run_folder(tmp_path, data, name)
        assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
        states.append(Checkpoints(folder, every_seconds=0).load()["strategies"]["it"]["state"])
    assert float(states[0]["importance"].max()) > 1e-3
    for name in ("importance", "anchor"):
        assert torch.allclose(states[0][name], states[1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("steps", [0, 3])
def test_a_step_that_is_skipped_because_its_gradient_overflowed_leaves_no_trace(steps: int) -> None:
    si, rwalk = SI(strength=0.1), RWalk(strength=0.1)
    run = in_doubles(si, rwalk).train(steps)
    if not steps:
        run.context.task = run.path[0]
        si.task_start(run.path[0])
        rwalk.task_start(run.path[0])
    before = [tensor if tensor is None else tensor.clone() for tensor in (si.path, rwalk.path, rwalk.fisher)]
    for parameter in run.architecture.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    for strategy in (si, rwalk):
        strategy.gradient()
        strategy.step_end(SimpleNamespace(step=steps + 1))
    for old, new in zip(before, (si.path, rwalk.path, rwalk.fisher)):
        assert torch.equal(new, torch.zeros_like(new) if old is None else old)


def test_what_hardly_moved_is_not_important_for_that() -> None:
    for damping in (1e-3, 1e3):
        si = SI(strength=1.0, damping=damping)
        in_doubles(si).train(STEPS)
        assert (float(si.importance.max()) > 1e-2) == (damping < 1)


def test_a_step_without_a_gradient_hook_is_refused_by_name() -> None:
    run = in_doubles(SI(strength=1.0))
    with pytest.raises(ValueError, match="SI: saw no gradient before the step"):
        run.strategies[0].step_end(None)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: SI(strength=-1.0), "strength"), (lambda: SI(strength=1.0, damping=0.0), "damping"),
     (lambda: RWalk(strength=-1.0), "strength"), (lambda: RWalk(strength=1.0, alpha=0.0), "alpha"),
     (lambda: RWalk(strength=1.0, interval=0), "interval")],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: "):
        make()
