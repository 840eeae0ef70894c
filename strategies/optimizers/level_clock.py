"""Levels that step at their own periods: the continuum memory system's clock over any optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clplat.architectures.base import HasLevels
from clplat.strategies.optimizers.joined import (
    Joined,
    NamedWeights,
    OptimizerFactory,
    built,
    matches,
    some_names,
)

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class Level:
    """Parameters that step together, once in `period` steps.

    `match` are patterns of their names (`*` for anything, dots included). `lr` replaces their optimizer's rate,
    `optimizer` the optimizer that all levels share, and `reduction` that of all levels. `within` names a slower level
    at whose periods' ends this one begins anew, `start_rate` of the way from where it began to where it has come.
    """

    match: list[str] = field(default_factory=lambda: ["*"])
    period: int = 1
    lr: float | None = None
    optimizer: OptimizerFactory | None = None
    reduction: Reduction | None = None
    within: str | None = None
    start_rate: float = 0.5


class LevelClock(Joined):
    """Every level of parameters gathers its gradients for `period` steps, and then its optimizer steps once.

    Nested Learning's continuum memory system with the clock of training steps (Behrouz et al. 2025, arXiv:2512.24695,
    Eq. 70-71): θ ← θ − f(Σ of the gradients of the last `period` steps), f the level's optimizer, if the step is a
    multiple of `period`; unchanged otherwise. With all periods 1 it is the optimizers alone, bit for bit.

    A level `within` another is nested (ibid., §7.1): when the slower one's period ends, θ₀ ← θ₀ + start_rate (θ − θ₀)
    and θ ← θ₀, and the level's optimizer forgets what it has of these weights. θ₀ is kept beside them in its state.
    """

    paper = "Behrouz et al. 2025, arXiv:2512.24695, Eq. 70-71"
    fidelity: ClassVar[str] = "interpretation"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        levels: Mapping[str, Level] | None = None,
        optimizer: OptimizerFactory | None = None,
        reduction: Reduction = "sum",
        unfinished: Literal["carry", "drop"] = "carry",
    ) -> None:
        """A parameter belongs to the first of `levels`, in order, that matches its name; to one it must. None takes the
        levels that the model itself has (`HasLevels`, as a continuum memory does), and lets all else step every time.
        `optimizer` is that of levels without their own. `reduction`: a period's gradients are added up (as printed), or
        averaged. `unfinished`: at the end of a task a period is gone on with in the next (needs `optimizer_state:
        keep`), or what it had gathered is dropped (`reset`)."""
        named = NamedWeights.given(params)
        self.levels = levels_of(named.module) if levels is None else dict(levels)
        self.reduction, self.unfinished = reduction, unfinished
        _check_nesting(self.levels)
        parts = _parts(named, self.levels)
        children = []
        for name, level in self.levels.items():
            factory = level.optimizer or optimizer
            if factory is None:
                raise ValueError(
                    f"levels.{name}.optimizer: give the level an optimizer, or all levels one (`optimizer`)"
                )
            child = built(factory, parts[name], f"levels.{name}.optimizer" if level.optimizer else "optimizer")
            for group in child.param_groups:
                # Whole periods are counted on the host and saved with the group.
                group |= {"level": name, "clock": 0} | ({} if level.lr is None else {"lr": level.lr})
            children.append(child)
        super().__init__(named, children)

    def _step_children(self) -> None:
        nested = {n: _weights(child) for n, child in self._by_name().items() if self.levels[n].within}
        # Taken out before the child looks: optimizers of torch take a parameter whose state is empty for a new one.
        starts = {p: self._start(p) for weights in nested.values() for p in weights}
        for child, level in zip(self.children, self.levels.values(), strict=True):
            self._step_child(child, level)
        for name, weights in nested.items():
            level = self.levels[name]
            assert level.within is not None
            if self._by_name()[level.within].param_groups[0]["clock"] == 0:
                self._begin_anew(weights, [starts[p] for p in weights], level.start_rate)
        for p, start in starts.items():
            self.state[p]["start"] = start

    def _step_child(self, child: torch.optim.Optimizer, level: Level) -> None:
        if level.period == 1:
            child.step()
            return
        groups = child.param_groups
        weights = _weights(child)
        self._gather(weights)
        clock = groups[0]["clock"] + 1
        if clock == level.period:
            self._release(child, weights, level)
        for group in groups:
            group["clock"] = clock % level.period

    def _by_name(self) -> dict[str, torch.optim.Optimizer]:
        return dict(zip(self.levels, self.children, strict=True))

    def _start(self, weight: Tensor) -> Tensor:
        """Where a weight of a nested level began; before the first step, where it is."""
        start = self.state.get(weight, {}).pop("start", None)
        return weight.detach().clone() if start is None else start

    def _begin_anew(self, weights: list[Tensor], starts: list[Tensor], rate: float) -> None:
        torch._foreach_lerp_(starts, [p.detach() for p in weights], rate)
        torch._foreach_copy_(weights, starts)
        for p in weights:
            self.state.pop(p, None)

    def _gather(self, weights: list[Tensor]) -> None:
        """Add the gradients of this step to those of the period."""
        fresh = [p for p in weights if p.grad is not None]
        known = [p for p in fresh if "pending" in self.state.get(p, ())]
        for p in fresh:
            if "pending" not in self.state.get(p, ()):
                assert p.grad is not None
                self.state[p]["pending"] = p.grad.clone()
        if known:
            torch._foreach_add_([self.state[p]["pending"] for p in known], [p.grad for p in known])

    def _release(self, child: torch.optim.Optimizer, weights: list[Tensor], level: Level) -> None:
        """Let the child step with what was gathered; the gradients of this step stay what they were."""
        own = [p.grad for p in weights]
        # Taken out for the same reason as starts.
        gathered = [self.state[p].pop("pending") if "pending" in self.state.get(p, ()) else None for p in weights]
        mean = (level.reduction or self.reduction) == "mean"
        if mean and (some := [one for one in gathered if one is not None]):
            torch._foreach_div_(some, level.period)
        for p, gradient in zip(weights, gathered, strict=True):
            p.grad = gradient
        try:
            child.step()
        finally:
            for p, gradient in zip(weights, own, strict=True):
                p.grad = gradient


REST = "rest"
"""The level of parameters that are in none of the model's own; they step every time."""


def levels_of(module: nn.Module | None) -> dict[str, Level]:
    """The levels that a model has; ValueError where it has none."""
    own = module.levels() if isinstance(module, HasLevels) else {}
    if not own:
        name = "this model" if module is None else type(module).__name__
        raise ValueError(
            f"levels: {name} has none at the clock of training steps; name them here, for example "
            "{slow: {match: ['blocks.0.*'], period: 8}, rest: {}}, or give the model a ContinuumMemory"
        )
    found = {
        name: Level(
            match=list(level.parameters),
            period=level.period,
            lr=level.lr,
            reduction=level.reduction,
            within=level.within,
            start_rate=level.start_rate,
        )
        for name, level in own.items()
    }
    assert module is not None
    taken = {name for level in own.values() for name in level.parameters}
    left = any(p.requires_grad and name not in taken for name, p in module.named_parameters())
    return found | ({REST: Level()} if left else {})


def _parts(named: NamedWeights, levels: Mapping[str, Level]) -> dict[str, NamedWeights]:
    """Each level's parameters; says which level takes nothing, and which parameter nobody takes."""
    if not levels:
        raise ValueError("levels: name at least one, for example {all: {period: 1}}")
    owner: dict[str, str] = {}
    for level, options in levels.items():
        if options.period < 1:
            raise ValueError(f"levels.{level}.period: must be at least 1 step, got {options.period}")
        if options.lr is not None and options.lr < 0:
            raise ValueError(f"levels.{level}.lr: must not be negative, got {options.lr}")
        for name, _ in named:
            if name not in owner and matches(name, options.match):
                owner[name] = level
    for level, options in levels.items():
        if level not in owner.values():
            raise ValueError(
                f"levels.{level}.match: {options.match} takes no parameter that an earlier level left; "
                f"they are called {some_names(named)}"
            )
    if left := named.where(lambda name, _: name not in owner):
        raise ValueError(
            f"levels: none takes {some_names(left)}; add a last level with match ['*'], with lr 0 if those are not "
            "to be trained"
        )
    return {level: named.where(lambda name, _, level=level: owner[name] == level) for level in levels}  # type: ignore[misc]


def _weights(child: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in child.param_groups for p in group["params"]]


def _check_nesting(levels: Mapping[str, Level]) -> None:
    """ValueError unless each nested level's period goes into that of the level around it, several times."""
    for name, level in levels.items():
        if not 0 <= level.start_rate <= 1:
            raise ValueError(f"levels.{name}.start_rate: must lie between 0 and 1, got {level.start_rate}")
        if level.within is None:
            continue
        if level.within not in levels:
            raise ValueError(f"levels.{name}.within: there is no level {level.within!r}, only {', '.join(levels)}")
        outer = levels[level.within].period
        if outer <= level.period or outer % level.period:
            raise ValueError(
                f"levels.{name}.within: the period of {level.within} ({outer}) must be a multiple of {name}'s "
                f"({level.period}), which begins anew inside of it"
            )
