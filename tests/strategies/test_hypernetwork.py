"""The output regularizer: its value and gradient by hand, the look-ahead, what it holds, and what it stores."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from clplat.architectures.hypernetwork.model import ChunkedHypernetwork, RecurrentHypernetwork
from clplat.architectures.mlp import MLP
from clplat.objective import Objective
from clplat.strategies import toy_run
from clplat.strategies.contract import check_strategy
from clplat.strategies.fisher import fisher_diagonal
from clplat.strategies.hypernetwork import HypernetworkRegularizer, candidates
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


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def set_gradients(module: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_look_ahead_is_what_the_optimizer_then_does_and_changes_nothing(name: str) -> None:
    looking, plain = network(), network()
    optimizers = [OPTIMIZERS[name](module.parameters()) for module in (looking, plain)]
    for step in range(4):
        for module in (looking, plain):
            set_gradients(module, step)
        gradients = [p.grad.clone() for p in looking.parameters()]
        before = copy.deepcopy(optimizers[0].state_dict())
        found = candidates(optimizers[0], list(looking.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(looking.parameters(), plain.parameters(), strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(looking.parameters(), gradients, strict=True))
        assert_same(optimizers[0].state_dict(), before)
        for optimizer in optimizers:
            optimizer.step()
        for ahead, parameter, other in zip(found, looking.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ahead, parameter) and torch.equal(parameter, other)
        assert_same(*(optimizer.state_dict() for optimizer in optimizers))


def assert_same(left, right) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def test_the_look_ahead_of_adam_is_its_equations() -> None:
    module = network().double()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    first = [torch.zeros_like(p) for p in module.parameters()]
    second = [torch.zeros_like(p) for p in module.parameters()]
    for step in range(1, 4):
        set_gradients_in_double(module, step)
        found = candidates(optimizer, list(module.parameters()))
        for number, parameter in enumerate(module.parameters()):
            first[number] = 0.9 * first[number] + 0.1 * parameter.grad
            second[number] = 0.999 * second[number] + 0.001 * parameter.grad.square()
            size = (second[number] / (1 - 0.999**step)).sqrt() + 1e-8
            expected = parameter.detach() - 3e-3 * first[number] / (1 - 0.9**step) / size
            assert torch.allclose(found[number], expected, rtol=0, atol=1e-12)
        optimizer.step()


def set_gradients_in_double(module: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)


def test_an_optimizer_that_fails_leaves_weights_and_state_as_they_were() -> None:
    module = network()
    optimizer = torch.optim.LBFGS(module.parameters())
    before = [p.clone() for p in module.parameters()]
    set_gradients(module, 0)
    with pytest.raises(TypeError):
        candidates(optimizer, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert not optimizer.state


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
