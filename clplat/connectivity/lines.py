"""Snapshots of a run, what lies on the straight line between two of them, and the losses along it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

SHARE = 0.05
"""Largest barrier of connected minima, as a share of the mean loss of the ends."""
State = dict[str, Tensor]
Space = Literal["weights", "products"]
"""`weights` moves every tensor, factors of adapters one by one; `products` moves the sum of the adapters' B·A."""
Losses = dict[str, float]
LINES = """α = 0 are the weights after the first task of a line, 1 those after the second. Losses of test rows: earlier,
of the tasks trained by the first; later, of the second alone; seen, of all up to the second; general, of the probes."""
"""What pictures and tables call the ends of a line and the sets of rows."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The losses on the line from one task's weights to another's, by the set that they were measured on."""

    first: str
    second: str
    space: Space
    weights: str
    """Which weights move, in words: those that answer after a task, such as `fast (adapter default, not slow)`."""
    distance: float
    """Euclidean distance of the ends in this space; `products` without the factor alpha / rank."""
    alphas: list[float]
    losses: dict[str, list[float]]

    def barrier(self, name: str) -> float:
        """Height of the loss above the straight line between its ends; at least 0."""
        values = self.losses[name]
        chord = [(1 - a) * values[0] + a * values[-1] for a in self.alphas]
        return max(value - line for value, line in zip(values, chord, strict=True))

    def connected(self, name: str) -> bool:
        """Whether the barrier stays below the share of the ends' mean loss that still counts as flat."""
        values = self.losses[name]
        return self.barrier(name) <= SHARE * (values[0] + values[-1]) / 2


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run was after a task."""

    index: int
    task: str
    structure: dict[str, Any]
    weights: State


def alike(first: Snapshot, second: Snapshot) -> bool:
    """Whether there is a line between them: the same tensors in the same shapes, used in the same way."""
    shapes = [{name: value.shape for name, value in snapshot.weights.items()} for snapshot in (first, second)]
    return shapes[0] == shapes[1] and first.structure == second.structure


def resting(first: Snapshot, second: Snapshot) -> list[str]:
    """Adapters that answer at neither end."""
    known = [*second.structure.get("adapters", ()), *second.structure.get("memories", ())]
    return [name for name in known if all(name not in end.structure["active"] for end in (first, second))]


def moved(first: Snapshot, second: Snapshot, own: str) -> str:
    """Which weights the line between them moves, `own` what a strategy with further ones calls them."""
    ends = [", ".join(end.structure.get("active", ())) for end in (first, second)]
    if not any(ends):
        return own or "all"
    adapters = f"adapter {' → '.join(dict.fromkeys(ends))}"
    others = f", not {', '.join(found)}" if (found := resting(first, second)) else ""
    return f"{own} ({adapters}{others})" if own else adapters + others


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> State:
    """(1 − α) first + α second; the ends themselves at 0 and 1. What is no floating number is the second's."""
    return {
        name: torch.lerp(first[name], value, alpha) if value.is_floating_point() and 0 < alpha < 1
        else (first[name] if alpha == 0 else value)
        for name, value in second.items()
    }  # fmt: skip


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Euclidean distance over all floating tensors."""
    parts = [(value.double() - first[name].double()).square().sum() for name, value in second.items()
             if value.is_floating_point()]  # fmt: skip
    return float(torch.stack(parts).sum().sqrt())


def walk(
    ends: tuple[str, str],
    space: Space,
    weights: str,
    apart: float,
    alphas: Sequence[float],
    losses: Callable[[float], Losses],
) -> Walk:
    """The losses at every alpha, set by set."""
    found = [losses(alpha) for alpha in alphas]
    by_set = {name: [each[name] for each in found] for name in found[0]}
    return Walk(
        first=ends[0], second=ends[1], space=space, weights=weights, distance=apart, alphas=list(alphas), losses=by_set
    )
