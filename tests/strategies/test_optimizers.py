"""Muon, M3 and delta momentum against their page's equations, written out step by step in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from optimizer_oracles import MATRICES, SHAPES, agrees, by_singular_values, gradients, weights
from torch import Tensor, nn

from clplat.strategies.optimizers.delta_momentum import DeltaMomentum
from clplat.strategies.optimizers.m3 import M3
from clplat.strategies.optimizers.muon import Muon

# Newton-Schulz and Muon


def test_muon_is_torchs_on_matrices_and_the_named_optimizer_on_the_rest() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 7))

    ours, theirs = network(), network()
    muon = Muon.for_module(ours, lr=0.1, others=lambda p: torch.optim.AdamW(p, lr=0.01), exclude=["3.weight"])
    parts = [torch.optim.Muon([theirs[1].weight], lr=0.1, weight_decay=0.0),
             torch.optim.AdamW([p for p in theirs.parameters() if p is not theirs[1].weight], lr=0.01)]  # fmt: skip
    for _ in range(4):
        for model, optimizers in ((ours, [muon]), (theirs, parts)):
            model(torch.arange(7)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


# M3


def m3_oracle(variant: str, second_moment: bool) -> Callable[[Tensor, list[Tensor], int], Tensor]:
    b1, b2, b3, alpha, lr, period, decay, eps = 0.9, 0.95, 0.8, 0.5, 0.1, 3, 0.2, 1e-8

    def run(w: Tensor, history: list[Tensor], place: int) -> Tensor:
        m1, m2, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
        for t, g in enumerate(history, start=1):
            if variant == "literal":
                m1, v, root = m1 + b1 * g, v + b2 * g * g, None
                root = v.sqrt()
            else:
                m1, v = b1 * m1 + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                root = (v / (1 - b2**t)).sqrt()
            step = by_singular_values(m1, 5) + (alpha * by_singular_values(m2, 5) if m2.any() else 0)
            w = w - lr * decay * w - lr * (step / (root + eps) if second_moment else step)
            if t % period == 0:
                window = sum(history[t - period : t])
                m2 = m2 + b3 * window if variant == "literal" else b3 * m2 + (1 - b3) * window / period
        return w

    return run


@pytest.mark.parametrize("second_moment", [True, False])
@pytest.mark.parametrize("variant", ["literal", "ema"])
def test_m3_is_its_algorithm_step_by_step(variant: str, second_moment: bool) -> None:
    def make(given: list[nn.Parameter]) -> M3:
        return M3(given, lr=0.1, variant=variant, betas=(0.9, 0.95, 0.8), alpha=0.5, period=3, weight_decay=0.2,
                  second_moment=second_moment)  # fmt: skip

    agrees(make, MATRICES, m3_oracle(variant, second_moment))


def test_m3_divides_by_the_second_moment_as_printed_in_the_literal_variant_alone() -> None:
    for variant, divides in (("literal", True), ("ema", False)):
        assert M3(weights(MATRICES), variant=variant).param_groups[0]["second_moment"] is divides


def test_literal_m3s_steps_die_while_the_averages_go_on() -> None:
    lengths = {}
    for variant in ("literal", "ema"):
        weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        optimizer = M3([weight], lr=1.0, variant=variant, second_moment=True, eps=0.0)
        for step in range(401):
            before = weight.detach().clone()
            weight.grad = gradients([(3, 3)], 1)[0][0]
            optimizer.step()
            if step in (100, 400):
                lengths[variant, step] = float((weight.detach() - before).norm())
    assert math.isclose(lengths["literal", 400] / lengths["literal", 100], (101 / 401) ** 0.5, rel_tol=1e-6)
    assert math.isclose(lengths["ema", 400] / lengths["ema", 100], 1.0, rel_tol=1e-3)


# Delta momentum


def delta_momentum_oracle(erase: str, side: str, preconditioner: str) -> Callable[..., Tensor]:
    def run(w: Tensor, history: list[Tensor], place: int) -> Tensor:
        rows = w.shape[0] if w.ndim > 1 and side == "input" else 1
        shape, w = w.shape, w.reshape(rows, -1)
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, flat in enumerate(history, start=1):
            g = flat.reshape(rows, -1)
            gram = torch.zeros(g.shape[1], g.shape[1], dtype=g.dtype)
            for row in g:
                gram += torch.outer(row, row)
            if erase == "bounded":
                gram = gram / (1 + (g * g).sum())
            v = 0.9 * v + 0.1 * g * g
            p = 1 if preconditioner == "none" else 1 / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
            m = m @ (0.8 * torch.eye(len(gram), dtype=g.dtype) - gram) - 0.05 * p * g
            w = w - 0.05 * 0.1 * w + m
        return w.reshape(shape)

    return run


@pytest.mark.parametrize("preconditioner", ["none", "rms"])
@pytest.mark.parametrize("side", ["input", "vector"])
@pytest.mark.parametrize("erase", ["bounded", "literal"])
def test_delta_momentum_is_its_equation_step_by_step(erase: str, side: str, preconditioner: str) -> None:
    def make(given: list[nn.Parameter]) -> DeltaMomentum:
        return DeltaMomentum(given, lr=0.05, momentum=0.8, erase=erase, side=side, preconditioner=preconditioner,
                             beta=0.9, weight_decay=0.1)  # fmt: skip

    agrees(make, SHAPES, delta_momentum_oracle(erase, side, preconditioner))


def test_literal_delta_momentum_diverges_on_large_gradients_and_the_bounded_one_does_not() -> None:
    ends = {}
    for erase in ("literal", "bounded"):
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = DeltaMomentum([weight], lr=0.01, erase=erase)
        for _ in range(60):
            weight.grad = torch.ones(4, dtype=torch.float64)  # ‖g‖² = 4 > 1 + α
            optimizer.step()
        ends[erase] = float(weight.detach().norm())
    assert ends["literal"] > 1e10 and ends["bounded"] < 10
