"""The look-ahead of the output regularizer: the optimizer's own next step, taken without leaving a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from studies import assert_same
from torch import nn

from clplat.strategies.hypernetwork import candidates

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
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)


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


def test_the_look_ahead_of_adam_is_its_equations() -> None:
    module = network().double()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    first = [torch.zeros_like(p) for p in module.parameters()]
    second = [torch.zeros_like(p) for p in module.parameters()]
    for step in range(1, 4):
        set_gradients(module, step)
        found = candidates(optimizer, list(module.parameters()))
        for number, parameter in enumerate(module.parameters()):
            first[number] = 0.9 * first[number] + 0.1 * parameter.grad
            second[number] = 0.999 * second[number] + 0.001 * parameter.grad.square()
            size = (second[number] / (1 - 0.999**step)).sqrt() + 1e-8
            expected = parameter.detach() - 3e-3 * first[number] / (1 - 0.9**step) / size
            assert torch.allclose(found[number], expected, rtol=0, atol=1e-12)
        optimizer.step()


def test_an_optimizer_that_fails_leaves_weights_and_state_as_they_were() -> None:
    module = network()
    optimizer = torch.optim.LBFGS(module.parameters())
    before = [p.clone() for p in module.parameters()]
    set_gradients(module, 0)
    with pytest.raises(TypeError):
        candidates(optimizer, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert not optimizer.state
