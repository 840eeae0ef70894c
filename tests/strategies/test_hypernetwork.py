"""The output regularizer: its value and gradient by hand, what it holds, and what it stores."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from clplat.architectures.hypernetwork.model import ChunkedHypernetwork, RecurrentHypernetwork
from clplat.architectures.mlp import MLP
from clplat.objective import Objective
from clplat.strategies import toy_run
from clplat.strategies.contract import check_strategy
from clplat.strategies.fisher import fisher_diagonal
from clplat.strategies.hypernetwork import HypernetworkRegularizer
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import STEPS, ToyRun
from clplat.streams.base import Spec


def target(spec: Spec) -> MLP:
    return MLP(spec=spec, hidden_sizes=[6])


def chunked(spec: Spec) -> ChunkedHypernetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ChunkedHypernetwork(
            spec=spec, target=target, chunk_size=20, task_embedding=5, chunk_embedding=4, hidden_sizes=[7]
        )


def growing(spec: Spec, *, freeze_grown: bool = False) -> RecurrentHypernetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RecurrentHypernetwork(
            spec=spec, target=target, chunk_size=20, task_embedding=5, chunk_embedding=4, hidden_size=7, grow_by=2,
            freeze_grown=freeze_grown,
        )  # fmt: skip


@pytest.fixture(params=[chunked, growing])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The toy run trains a hypernetwork in place of its own small model."""
    monkeypatch.setattr(toy_run, "ToyModel", request.param)
    return request.param


CASES = {
    "look-ahead": lambda: HypernetworkRegularizer(strength=0.005),
    "none": lambda: HypernetworkRegularizer(strength=0.005, lookahead=False),
    "one task a step": lambda: HypernetworkRegularizer(strength=0.005, tasks_per_step=1),
    "importance": lambda: HypernetworkRegularizer(strength=0.005, importance=True, fisher_samples=6),
}


@pytest.mark.parametrize("name", CASES)
def test_it_keeps_the_contract(model, name: str) -> None:
    check_strategy(CASES[name], Objective, off={"strength": 0.0})


def in_doubles(strategy: HypernetworkRegularizer, steps: int) -> ToyRun:
    """A run in float64 that stands inside its last task."""
    run = ToyRun([strategy], Objective)
    run.architecture.double()
    run._follow_growth()
    run.optimizer = run._new_optimizer()
    for task in run.path:
        task.train.inputs = task.train.inputs.double()
    return run.train(steps)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_papers_sum_at_the_looked_ahead_point(model, name: str) -> None:
    strategy = CASES[name]()
    run = in_doubles(strategy, 2 * STEPS + 2)
    hyper, batch = run.architecture, run.path[2].train.batch(torch.arange(4))
    run.optimizer.zero_grad()
    run.context.loss(hyper(batch), batch).backward()
    task_gradient = {n: p.grad.clone() for n, p in hyper.generator.named_parameters()}
    embedding = hyper.embeddings.grad.clone()
    before = run.context.generator.get_state()
    places = [0, 1]
    if strategy.tasks_per_step:
        places = torch.randperm(2, generator=run.context.generator)[:1].tolist()
        run.context.generator.set_state(before)
    strategy.gradient()

    generator = copy.deepcopy(hyper.generator)
    for parameter, (name_, own) in zip(generator.parameters(), hyper.generator.named_parameters(), strict=True):
        # SGD with momentum 0.9 and rate 0.1, by hand.
        kept = run.optimizer.state[own].get("momentum_buffer")
        velocity = task_gradient[name_] + (0 if kept is None else 0.9 * kept)
        parameter.data = own.data - (0.1 * velocity if strategy.lookahead else 0)
    penalty = 0.0
    for place in places:
        stage = hyper.stages[place]
        raw = generator(hyper.past_embeddings[place : place + 1], stage)[0, : hyper.target.num_weights]
        weights = hyper.offset.repeat_interleave(hyper.lengths) + raw * hyper.scale.repeat_interleave(hyper.lengths)
        weight = strategy.importances.get(place, torch.ones(()))
        penalty = penalty + (weight * (weights - strategy.targets[place]).square()).sum()
    expected = torch.autograd.grad(0.005 / len(places) * penalty, list(generator.parameters()), materialize_grads=True)
    for (name_, own), added in zip(hyper.generator.named_parameters(), expected, strict=True):
        assert torch.allclose(own.grad - task_gradient[name_], added, rtol=1e-8, atol=1e-12), name_
    assert any(bool(added.abs().max() > 1e-7) for added in expected)
    assert torch.equal(hyper.embeddings.grad, embedding)


def test_targets_are_what_the_generator_gave_when_the_task_began(model) -> None:
    strategy = HypernetworkRegularizer(strength=0.5)
    run = ToyRun([strategy], Objective).train(2 * STEPS)
    before = run.architecture.generated_weights([0, 1]).detach()
    run.train(3 * STEPS - 1)
    assert torch.equal(strategy.targets, before)


def change_of_the_first_task(strength: float) -> float:
    """Largest change of a probability that the first task's rows are answered with, over 150 steps on the second."""
    run = ToyRun([HypernetworkRegularizer(strength=strength)], Objective).train(STEPS + 1)
    rows, model = run.path[0].train.batch(torch.arange(12)), run.architecture
    before = model(rows).logits.detach().softmax(-1)
    run.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(150):
        run._step(run._rows(run.path[1]))
    return float((model(rows).logits.detach().softmax(-1) - before).abs().max())


def test_a_large_strength_keeps_what_earlier_tasks_answer(model) -> None:
    free, held = change_of_the_first_task(0.0), change_of_the_first_task(1e3)
    assert free > 0.2
    assert held < 0.02


def test_a_frozen_generator_that_grew_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_run, "ToyModel", lambda spec: growing(spec, freeze_grown=True))
    held, free = (ToyRun([HypernetworkRegularizer(strength=s)], Objective).train() for s in (3.0, 0.0))
    for name, weight in held.weights().items():
        assert torch.equal(weight, free.weights()[name]), name


def test_importance_is_the_floored_fisher_of_the_generated_weights(model) -> None:
    strategy = HypernetworkRegularizer(strength=0.5, importance=True, fisher_samples=None, fisher_batch_size=5)
    run = in_doubles(strategy, STEPS - 1)
    hyper, task, own = run.architecture, run.path[0], run.context.generator
    run.context.masked = lambda output, batch: _only(output.logits, batch.targets)
    strategy.task_end(task)
    weights = hyper.generated_weights([0])[0].detach().requires_grad_()
    hyper.eval()
    total = torch.zeros_like(weights)
    for row in range(len(task.train)):
        batch = task.train.batch(torch.tensor([row]))
        loss = F.cross_entropy(hyper.answer_with(weights, batch, 0).logits, batch.targets)
        total += torch.autograd.grad(loss, weights)[0].square()
    share = total / total.mean()
    assert torch.allclose(strategy.importances[0], 0.5 + 0.5 * share.clamp(max=10.0), rtol=1e-9)
    assert own is run.context.generator and hyper.generator.training is False
    hyper.train()
    strategy.task_end(task)
    assert all(module.training for module in hyper.modules())


def _only(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits under which the observed label is the one that is drawn."""
    return logits.masked_fill(torch.arange(logits.shape[-1]) != targets.unsqueeze(-1), float("-inf"))


def test_gradients_by_row_go_through_both_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(spec: Spec) -> RecurrentHypernetwork:
        torch.manual_seed(0)
        return RecurrentHypernetwork(spec=spec, target=target, chunk_size=20, hidden_size=4)

    for make in (chunked, fixed):
        monkeypatch.setattr(toy_run, "ToyModel", make)
        run = ToyRun([], Objective).train(1)
        options = {"samples": None, "labels": "observed"}
        at_once, one_by_one = (
            fisher_diagonal(run.context, run.path[0], batch_size=size, per_sample=True, **options) for size in (6, 1)
        )
        assert torch.allclose(at_once, one_by_one, rtol=1e-3, atol=1e-7)


def test_it_goes_with_replay(model) -> None:
    strategies = [ExperienceReplay(capacity=6), HypernetworkRegularizer(strength=0.1)]
    assert all(bool(weight.isfinite().all()) for weight in ToyRun(strategies, Objective).train().weights().values())


def test_a_model_that_generates_nothing_is_refused_with_the_ones_that_do() -> None:
    with pytest.raises(ValueError, match="ToyModel generates no weights.*ChunkedHypernetwork or RecurrentHypernetwork"):
        ToyRun([HypernetworkRegularizer(strength=1.0)], Objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": -1.0}, "strength"), ({"strength": 1.0, "tasks_per_step": 0}, "tasks_per_step"),
     ({"strength": 1.0, "fisher_samples": 0}, "fisher_samples")],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HypernetworkRegularizer(**options)


def test_generated_weights_take_other_parameters_without_keeping_them(model) -> None:
    hyper = ToyRun([], Objective).architecture
    before = hyper.generated_weights([0])
    other = {name: p.detach() + 1 for name, p in hyper.shared_parameters().items()}
    moved = hyper.generated_weights([0], other)
    raw = functional_call(hyper.generator, other, (hyper.embeddings, 0))
    assert not torch.allclose(moved, before)
    assert torch.equal(hyper.generated_weights([0]), before)
    assert raw.shape[1] >= moved.shape[1]
