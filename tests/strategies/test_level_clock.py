"""The clock of levels against optimizers that are called by hand, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clplat.strategies.optimizers.joined import NamedWeights
from clplat.strategies.optimizers.level_clock import Level, LevelClock
from clplat.strategies.optimizers.muon import Muon

Rows = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows(step: int) -> Rows:
    source = torch.Generator().manual_seed(step)
    return (torch.randn(8, 4, generator=source, dtype=torch.float64),
            torch.randn(8, 3, generator=source, dtype=torch.float64))  # fmt: skip


def backward(model: nn.Module, step: int) -> None:
    inputs, targets = rows(step)
    (model(inputs) - targets).square().mean().backward()


def adam(lr: float = 0.01) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=lr)


def momentum(lr: float = 0.1) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9)


LEVELS = {
    "fast": Level(match=["4.*"], optimizer=momentum()),
    "middle": Level(match=["2.*"], period=3),
    "slow": Level(period=4, lr=0.5, optimizer=momentum()),
}


def clock(model: nn.Module, **options: Any) -> LevelClock:
    return LevelClock.for_module(model, **{"levels": LEVELS, "optimizer": adam(), **options})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_levels_step_at_their_periods_with_what_their_periods_gathered(reduction: str) -> None:
    model, other = network(), network()
    optimizer = clock(model, reduction=reduction)
    by_hand = [(momentum()(other[4].parameters()), 1, other[4]), (adam()(other[2].parameters()), 3, other[2]),
               (momentum(0.5)(other[0].parameters()), 4, other[0])]  # fmt: skip
    gathered: dict[nn.Parameter, Tensor] = {}
    for step in range(1, 15):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        backward(other, step)
        for part, period, layer in by_hand:
            for p in layer.parameters():
                assert p.grad is not None
                gathered[p] = gathered.get(p, torch.zeros_like(p)) + p.grad
                p.grad = None
            if step % period == 0:
                for p in layer.parameters():
                    p.grad = gathered.pop(p) / (period if reduction == "mean" else 1)
                part.step()
                part.zero_grad()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_slow_level_stands_still_inside_its_period() -> None:
    model = network()
    optimizer, weight, changed = clock(model), model[0].weight, []
    for step in range(1, 10):
        before = weight.detach().clone()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        changed.append(not torch.equal(before, weight))
    assert changed == [step % 4 == 0 for step in range(1, 10)]


def test_with_all_periods_one_the_clock_is_its_optimizer_bit_for_bit() -> None:
    model, other = network(), network()
    ours = LevelClock.for_module(model, levels={"a": Level(match=["0.*"]), "b": Level()}, optimizer=adam())
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01)
    for step in range(5):
        for one, optimizer in ((model, ours), (other, theirs)):
            backward(one, step)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_gradients_of_a_step_stand_as_they_were_after_it() -> None:
    model = network()
    optimizer = clock(model)
    for step in range(1, 13):
        backward(model, step)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
        optimizer.zero_grad()


def test_a_parameter_that_had_no_gradient_in_a_step_adds_nothing_and_one_that_never_had_stays() -> None:
    unused, used = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LevelClock(
        [unused, used], levels={"all": Level(period=2)}, optimizer=lambda p: torch.optim.SGD(p, lr=1)
    )
    for gradient in (torch.ones(2), None):
        used.grad = gradient
        optimizer.step()
    assert used.tolist() == [0, 0] and unused.tolist() == [1, 1] and used.grad is None


def test_a_schedule_that_changes_the_rates_of_all_groups_reaches_every_level_and_every_optimizer_inside() -> None:
    model = network()
    levels = {"muon": Level(optimizer=lambda p: Muon(p, lr=0.1, others=adam()), match=["0.*"]), "slow": Level(period=2)}
    optimizer = LevelClock.for_module(model, levels=levels, optimizer=momentum())
    optimizer.load_state_dict(optimizer.state_dict())  # what is loaded must be linked again
    assert [group["level"] for group in optimizer.param_groups] == ["muon", "muon", "slow"]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": {}}, "levels: name at least one"),
        ({"levels": {"a": Level(match=["0.*"])}}, r"levels: none takes 2.weight, 2.bias, 4.weight, 4.bias; add a last"),
        ({"levels": {"a": Level(), "b": Level()}}, r"levels.b.match: \['\*'\] takes no parameter that an earlier"),
        ({"levels": {"a": Level(match=["layers.*"])}}, r"levels.a.match: .* they are called 0.weight, 0.bias"),
        ({"levels": {"a": Level(period=0)}}, "levels.a.period: must be at least 1 step, got 0"),
        ({"levels": {"a": Level(lr=-1.0)}}, "levels.a.lr: must not be negative"),
        ({"levels": {"a": Level(within="b")}}, "levels.a.within: there is no level 'b', only a"),
        (
            {"levels": {"a": Level(match=["0.*"], period=2, within="b"), "b": Level(period=3)}},
            r"levels.a.within: the period of b \(3\) must be a multiple of a's \(2\)",
        ),
        ({"levels": {"a": Level(start_rate=2.0)}}, "levels.a.start_rate: must lie between 0 and 1, got 2"),
        ({"levels": {"a": Level()}, "optimizer": None}, "levels.a.optimizer: give the level an optimizer"),
        ({"levels": {"a": Level()}, "optimizer": adam(-1.0)}, "optimizer: Invalid learning rate: -1"),
        (
            {"levels": {"a": Level(optimizer=lambda p: Muon(p))}},
            "levels.a.optimizer: others: Muon takes matrices, and 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clock(network(), **options)


def test_groups_of_ones_own_are_refused() -> None:
    with pytest.raises(ValueError, match="params: this optimizer makes its own groups"):
        NamedWeights.given([{"params": [nn.Parameter(torch.ones(1))]}])


NESTED = {
    "fast": Level(match=["4.*"], within="middle", start_rate=0.25),
    "middle": Level(match=["2.*"], period=2, within="slow", start_rate=0.5, optimizer=momentum()),
    "slow": Level(period=6, optimizer=momentum()),
}


def test_a_nested_level_begins_anew_at_the_end_of_the_slower_ones_period_with_the_start_that_has_moved() -> None:
    model, other = network(), network()
    optimizer = clock(model, levels=NESTED)
    layers = {"fast": (other[4], 1, adam()), "middle": (other[2], 2, momentum()), "slow": (other[0], 6, momentum())}
    children = {name: make(layer.parameters()) for name, (layer, _, make) in layers.items()}
    starts = {name: [p.detach().clone() for p in layer.parameters()] for name, (layer, *_) in layers.items()}
    gathered: dict[nn.Parameter, Tensor] = {}
    for step in range(1, 15):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        backward(other, step)
        for name, (layer, period, _) in layers.items():
            for p in layer.parameters():
                assert p.grad is not None
                gathered[p] = gathered.get(p, torch.zeros_like(p)) + p.grad
                p.grad = gathered.pop(p) if step % period == 0 else None
            children[name].step()
            children[name].zero_grad()
        for name, (ends, rate) in {"fast": (2, 0.25), "middle": (6, 0.5)}.items():
            if step % ends == 0:
                layer, _, make = layers[name]
                for p, start in zip(layer.parameters(), starts[name], strict=True):
                    start += rate * (p.detach() - start)
                    p.data.copy_(start)
                children[name] = make(layer.parameters())  # momenta of what is undone are forgotten
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_nested_levels_that_were_saved_inside_of_all_periods_go_on_bit_for_bit() -> None:
    model, other = network(), network()
    optimizer, resumed = clock(model, levels=NESTED), clock(other, levels=NESTED)
    for step in range(1, 14):
        if step == 10:
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, clocked in ((model, optimizer), (other, resumed)):
            backward(one, step)
            clocked.step()
            clocked.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("start_rate", [0.0, 1.0])
def test_a_nested_level_is_set_back_whole_or_not_at_all_at_the_ends_of_its_rate(start_rate: float) -> None:
    model, other = network(), network()
    levels = {"fast": Level(match=["4.*"], within="slow", start_rate=start_rate), "slow": Level(period=3)}
    plain = {"fast": Level(match=["4.*"]), "slow": Level(period=3)}
    sgd = partial(torch.optim.SGD, lr=0.1)
    ours, theirs = clock(model, levels=levels, optimizer=sgd), clock(other, levels=plain, optimizer=sgd)
    first = model[4].weight.detach().clone()
    for step in range(3):
        for one, clocked in ((model, ours), (other, theirs)):
            backward(one, step)
            clocked.step()
            clocked.zero_grad()
    assert torch.equal(model[4].weight, first) == (start_rate == 0)
    assert torch.equal(model[4].weight, other[4].weight) == (start_rate == 1)
