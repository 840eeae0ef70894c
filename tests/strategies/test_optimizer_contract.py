"""What holds for every optimizer of ours, alone and as a level of the clock."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from no_questions import NoQuestions
from studies import assert_same
from torch import Tensor, nn

from clplat.strategies.hypernetwork import candidates
from clplat.strategies.optimizers.deep_momentum import DeepMomentum
from clplat.strategies.optimizers.delta_gradient_descent import DGD
from clplat.strategies.optimizers.delta_momentum import DeltaMomentum
from clplat.strategies.optimizers.joined import NamedWeights
from clplat.strategies.optimizers.level_clock import Level, LevelClock
from clplat.strategies.optimizers.m3 import M3
from clplat.strategies.optimizers.muon import Muon

Factory = Callable[[Any], torch.optim.Optimizer]


def others(params: Any) -> torch.optim.Optimizer:
    """Not Adam, whose count of steps is a tensor on the CPU: `NoQuestions` cannot tell it from one on a GPU."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


PLAIN: dict[str, Factory] = {
    "DGD mean": lambda p: DGD(p, lr=0.1, erase=0.01, others=others),
    "DGD proximal": lambda p: DGD(p, lr=0.1, erase=0.01, form="proximal", others=others),
    "DeltaMomentum": lambda p: DeltaMomentum(p, lr=0.02, preconditioner="rms", momentum=0.5),
    "DeepMomentum": lambda p: DeepMomentum(p, lr=0.1),
    "DeepMomentum linear": lambda p: DeepMomentum(p, lr=0.1, memory="linear"),
    "Muon": lambda p: Muon(p, lr=0.02, others=others),
    "M3 ema": lambda p: M3(p, lr=0.02, period=3, others=others),
    "M3 literal": lambda p: M3(p, lr=0.02, period=3, variant="literal", others=others),
}


def as_level(inner: Factory) -> Factory:
    return lambda p: LevelClock(
        p, levels={"slow": Level(match=["0.*"], period=3, optimizer=inner), "fast": Level(optimizer=others)}
    )


MAKERS = PLAIN | {f"{name}, a level": as_level(inner) for name, inner in PLAIN.items()}


class Task:
    """A small network with an optimizer, on a linear regression."""

    def __init__(self, make: Factory) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = make(NamedWeights.of(self.model))
        self.inputs = torch.randn(32, 6)
        self.targets = self.inputs @ torch.randn(6, 3)
        self.steps = 0

    def train(self, steps: int) -> float:
        for _ in range(steps):
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        with torch.no_grad():
            return float(self.loss())

    def loss(self) -> Tensor:
        return 0.5 * (self.model(self.inputs) - self.targets).square().mean()

    def saved(self) -> dict[str, Any]:
        """What a checkpoint would hold, through a file of tensors and plain data."""
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    def load(self, saved: dict[str, Any]) -> Task:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return self


@pytest.mark.parametrize("name", MAKERS)
def test_saved_at_any_step_and_loaded_anew_it_goes_on_bit_for_bit(name: str) -> None:
    for stop in (0, 1, 3, 5):
        whole, part = Task(MAKERS[name]), Task(MAKERS[name])
        whole.train(8)
        part.train(stop)
        saved = part.saved()
        resumed = Task(MAKERS[name]).load(saved)
        assert_same(resumed.saved(), saved)
        resumed.train(8 - stop)
        assert_same(resumed.saved(), whole.saved(), f"stopped at {stop}")


@pytest.mark.parametrize("name", MAKERS)
def test_it_lowers_the_loss_to_a_tenth_in_two_hundred_steps_of_falling_rates(name: str) -> None:
    task = Task(MAKERS[name])
    first, rates = task.train(0), [group["lr"] for group in task.optimizer.param_groups]
    for step in range(200):
        for group, rate in zip(task.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 200)
        task.train(1)
    assert task.train(0) < 0.1 * first


@pytest.mark.parametrize("name", MAKERS)
def test_no_step_waits_for_the_device(name: str) -> None:
    task = Task(MAKERS[name])
    task.train(3)
    for _ in range(3):
        task.loss().backward()
        with NoQuestions():
            task.optimizer.step()
        task.optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKERS)
def test_a_look_ahead_on_copies_sees_the_next_step_and_changes_nothing(name: str) -> None:
    task, other = Task(MAKERS[name]), Task(MAKERS[name])
    task.train(5)
    other.train(5)
    for _ in range(3):
        parameters = list(task.model.parameters())
        task.loss().backward()
        seen = candidates(task.optimizer, parameters)
        task.optimizer.step()
        task.optimizer.zero_grad()
        other.train(1)
        assert all(torch.equal(a, b) for a, b in zip(seen, parameters, strict=True))
        assert_same(task.saved(), other.saved())


def test_dgd_reads_rows_of_training_alone_and_of_its_own_layers_alone() -> None:
    task = Task(PLAIN["DGD mean"])
    weight = task.model[0].weight
    task.model.eval()(task.inputs)
    with torch.no_grad():
        task.model.train()(task.inputs)
    assert not task.optimizer.state[weight]
    task.model(task.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        task.model(task.inputs[:5])
    kept = task.optimizer.state[weight]
    rows = torch.cat([task.inputs, task.inputs[:5]])
    assert kept["rows"] == 37 and torch.allclose(kept["inputs"], rows.T @ rows, atol=1e-5)


def test_dgd_leaves_a_layer_when_its_optimizer_is_gone() -> None:
    task = Task(PLAIN["DGD mean"])
    task.optimizer = PLAIN["DGD mean"](NamedWeights.of(task.model))
    gc.collect()
    assert [len(layer._forward_hooks) for layer in (task.model[0], task.model[2])] == [1, 1]


def test_dgd_takes_a_layer_over_from_an_optimizer_that_is_not_gone_yet() -> None:
    task = Task(PLAIN["DGD mean"])
    earlier = task.optimizer
    task.model(task.inputs)
    task.optimizer = PLAIN["DGD mean"](NamedWeights.of(task.model))
    task.optimizer.load_state_dict(earlier.state_dict())
    task.model(task.inputs)
    kept = task.optimizer.state[task.model[0].weight]
    assert kept["rows"] == 64 and torch.allclose(kept["inputs"], 2 * task.inputs.T @ task.inputs, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_dgd_reads_inputs_of_a_compiled_model_too() -> None:
    task, other = Task(PLAIN["DGD mean"]), Task(PLAIN["DGD mean"])
    forward = torch.compile(task.model, backend="eager")
    for _ in range(3):
        (0.5 * (forward(task.inputs) - task.targets).square().mean()).backward()
        task.optimizer.step()
        task.optimizer.zero_grad()
    other.train(3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(task.model.parameters(), other.model.parameters()))


def test_dgd_without_a_module_or_without_the_layers_forward_pass_is_refused() -> None:
    layer = nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match=r"params: DGD reads the inputs of layers; build it with DGD.for_module"):
        DGD(layer.parameters())
    optimizer = DGD.for_module(layer)
    layer.weight.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="DGD: weight: .* something else uses the weight, so give it to `others`"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Muon(p), r"others: Muon takes matrices, and 0.bias \(8,\) is none"),
        (lambda p: M3(p, others=others, exclude=["*"]), "exclude: no matrix is left for M3 among 0.weight"),
        (lambda p: M3(p, others=others, exclude=["head.*"]), r"exclude: 'head.\*' is the name of no parameter"),
        (lambda p: M3(p, others=others, period=0), "period: must be at least 1 step, got 0"),
        (lambda p: M3(p, others=others, betas=(0.9, 1.0, 0.9)), "betas.1: must be at least 0 and below 1, got 1.0"),
        (lambda p: DeltaMomentum(p, momentum=1.5), "momentum: must be at least 0 and below 1"),
        (lambda p: DeepMomentum(p, memory_lr=-1), "memory_lr: must not be negative"),
        (lambda p: DeepMomentum(p, hidden_size=0), "hidden_size: must be at least 1"),
        (lambda p: DeepMomentum(p, momentum=1.1), "momentum: must be from 0 to 1"),
        (lambda p: DGD(p, erase=-0.1, others=others), "erase: must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_by_the_options_name(make: Factory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(make)
