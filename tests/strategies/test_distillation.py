"""LwF: the divergence from the old answers against its definition, over the heads that each scenario has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clplat.objective import Objective
from clplat.strategies.contract import check_resume
from clplat.strategies.distillation import LwF
from clplat.strategies.toy_run import BATCH, STEPS, ToyRun
from clplat.streams.batch import CURRENT, REPLAY, Batch

HEADS = {"class": [[0, 1, 2, 3]], "task": [[0, 1], [2, 3]], "domain": [list(range(6))]}
"""Which output units are held together in the third task."""


def after_two_tasks(lwf: LwF, scenario: str) -> tuple[ToyRun, Tensor, Batch]:
    """A run two steps into the third task, the old model's answers to a batch of it, and the batch."""
    run = ToyRun([lwf], Objective)
    run.context.spec = replace(run.context.spec, scenario=scenario)
    run.train(2 * STEPS)
    batch = run.path[2].train.batch(torch.arange(BATCH))
    old = run.architecture(batch).logits.detach()
    return run.train(2 * STEPS + 2), old, batch


def divergence(old: Tensor, new: Tensor, units: list[int], temperature: float) -> Tensor:
    """KL row by row, written out, (B,)."""
    p, q = ((logits[:, units].double() / temperature).softmax(-1) for logits in (old, new))
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("scenario", HEADS)
def test_the_penalty_is_the_softened_divergence_from_the_old_answers(scenario: str) -> None:
    run, old, batch = after_two_tasks(LwF(alpha=0.7, temperature=3.0), scenario)
    output = run.architecture(batch)
    penalty = run.strategies[0].penalty(output, batch)
    expected = sum(divergence(old, output.logits, units, 3.0).mean() for units in HEADS[scenario])
    assert float(penalty.detach()) > 1e-3
    assert float(penalty.detach()) == pytest.approx(0.7 * 9 * float(expected.detach()), rel=1e-5)


def test_replayed_rows_are_held_to_nothing() -> None:
    run, _, batch = after_two_tasks(LwF(), "class")
    alone = run.strategies[0].penalty(run.architecture(batch), batch)
    replayed = run.path[0].train.batch(torch.arange(3)).with_origin(REPLAY)
    mixed = batch.with_origin(CURRENT).joined(replayed)
    assert torch.allclose(run.strategies[0].penalty(run.architecture(mixed), mixed), alone, rtol=1e-6)


def test_the_old_model_stays_as_the_last_task_left_it_and_is_not_trained() -> None:
    run, old, batch = after_two_tasks(LwF(), "class")
    teacher = run.strategies[0].teacher
    assert torch.equal(teacher(batch).logits, old)
    assert not torch.allclose(run.architecture(batch).logits, old, atol=1e-3)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def test_each_task_has_its_own_alpha_where_a_list_is_given_also_after_resuming() -> None:
    by_task, constant = LwF(alpha=[0.0, 0.0, 1.5]), LwF(alpha=1.5)
    first = ToyRun([by_task], Objective).train(2 * STEPS)
    assert first.strategies[0].penalty(None, None) is None
    plain = ToyRun([], Objective).train(2 * STEPS)
    assert all(torch.equal(w, plain.weights()[name]) for name, w in first.weights().items())
    first.train(2 * STEPS + 1)
    assert by_task.alpha == constant.alpha
    check_resume(lambda: LwF(alpha=[0.0, 0.5, 1.5]), Objective)


def test_answers_change_less_the_larger_alpha_is() -> None:
    drift = []
    for alpha in (0.0, 1.0, 5.0):
        run = ToyRun([LwF(alpha=alpha)], Objective).train(STEPS)
        batch = run.path[1].train.batch(torch.arange(BATCH))
        old = run.architecture(batch).logits.detach()
        run.optimizer.param_groups[0]["lr"] = 0.02
        new = run.train(2 * STEPS).architecture(batch).logits.detach()
        drift.append(float(divergence(old, new, [0, 1], 1.0).mean()))
    assert drift[0] > 1.2 * drift[1] > 1.5 * drift[2]


def test_the_current_loss_counts_by_its_tasks_share_and_replayed_rows_fully() -> None:
    run, _, batch = after_two_tasks(LwF(loss_weight="share"), "class")
    lwf, loss = run.strategies[0], run.context.loss
    output = run.architecture(batch)
    assert torch.allclose(loss(output, lwf.batch(batch)), loss(output, batch) / 3, rtol=1e-6)
    mixed = batch.joined(run.path[0].train.batch(torch.arange(3)).with_origin(REPLAY, 0.5))
    weight = lwf.batch(mixed).weight
    assert torch.allclose(weight[:BATCH], torch.tensor(1 / 3)) and (weight[BATCH:] == 0.5).all()


def test_among_all_classes_seen_the_current_ones_take_chances_from_the_old() -> None:
    run, old, batch = after_two_tasks(LwF(alpha=0.7, temperature=3.0, softmax="seen"), "class")
    output = run.architecture(batch)
    p = (old[:, [0, 1, 2, 3]].double() / 3).softmax(-1)
    q = (output.logits.double() / 3).softmax(-1)[:, [0, 1, 2, 3]]
    expected = 0.7 * 9 * float((p * (p.log() - q.log())).sum(-1).mean().detach())
    assert float(run.strategies[0].penalty(output, batch).detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"LwF\.softmax: seen is for classes in the class scenario"):
        run.context.spec = replace(run.context.spec, scenario="task")
        LwF(softmax="seen").setup(run.context)


def test_the_first_task_is_trained_as_without_it() -> None:
    held, plain = ToyRun([LwF(loss_weight="share")], Objective), ToyRun([], Objective)
    assert all(torch.equal(w, plain.train(STEPS).weights()[n]) for n, w in held.train(STEPS).weights().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": -1.0}, "alpha"), ({"alpha": []}, "alpha"), ({"alpha": [0.0, -1.0]}, "alpha"),
     ({"temperature": 0.0}, "temperature"), ({"loss_weight": "half"}, "loss_weight"), ({"softmax": "all"}, "softmax")],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: "):
        LwF(**options)


def test_a_list_that_is_too_short_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"LwF\.alpha: 2 numbers for 3 tasks"):
        ToyRun([LwF(alpha=[0.0, 1.0])], Objective)
