"""Penalties whose importances are gathered along the way: what each weight's steps did for the loss (SI, RWalk)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from clplat.architectures.base import StepOutcome
from clplat.strategies.base import Strategy
from clplat.strategies.quadratic import QuadraticPenalty
from clplat.strategies.weights import flat_gradients
from clplat.streams.base import Task


class PathIntegral(QuadraticPenalty):
    """ω = −Σ_steps g · Δθ for each weight: the fall of the loss that its steps explain to first order.

    g is what stands in `.grad` when the strategy's turn comes (after accumulation and all-reduce, before clipping)
    less the gradient of its own penalty, which is known exactly. What other strategies add to the loss is part of g:
    replayed rows, and other penalties. Δθ is the step that the optimizer made of it, momentum and clipping included.
    """

    kept = (*QuadraticPenalty.kept, "path")
    own_pull: bool = False
    """Whether g keeps the gradient of the penalty itself."""
    path: Tensor | None = None
    slope: Tensor | None = None
    start: Tensor | None = None

    def task_start(self, task: Task) -> None:
        if self.strength:
            self.anchor = self.weights().detach()

    @torch.no_grad()
    def gradient(self) -> None:
        if not self.strength:
            return
        self.start = self.weights()
        if self.anchor is None:
            self.anchor = self.start
        if self.path is None:
            self.path = torch.zeros_like(self.start)
        self.slope = flat_gradients(self.context.architecture)
        if not self.own_pull:
            self.slope -= self.pull(self.start)

    @torch.no_grad()
    def step_end(self, outcome: StepOutcome) -> None:
        if not self.strength:
            return
        if self.path is None or self.slope is None or self.start is None:
            raise ValueError(f"{type(self).__name__}: saw no gradient before the step; it cannot stand beside a "
                             "strategy that owns the step")  # fmt: skip
        moved = self.weights() - self.start
        # 16-bit training skips a step whose gradient overflowed: infinity times nothing would be no number.
        self.path -= torch.where(moved == 0, 0.0, self.slope * moved)
        self.slope = self.start = None


class SI(PathIntegral, Strategy):
    """Synaptic intelligence: c Σ_i W_i (θ_i − θ*_i)², with W the fall of the loss that a weight's path explains.

    At the end of a task W_i += max(ω_i, 0) / ((θ_i − θ*_i)² + ξ), θ* the weights at its start.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    kept = (*PathIntegral.kept, "total")
    paper = "Zenke et al. 2017, arXiv:1703.04200, Eq. 3-5"
    fidelity = "exact"
    total: Tensor | None = None

    def __init__(
        self, *, strength: float, damping: float = 0.1, definition: Literal["paper", "avalanche"] = "paper"
    ) -> None:
        """`strength` is c; at 0 no path is gathered either. `damping` is ξ, in units of squared weights: a weight that
        hardly moved is not important for that. `definition="avalanche"` does what Avalanche 0.6.0 does: g includes the
        penalty's gradient, negative ω stay, and W is cut off at 0.001."""
        if strength < 0:
            raise ValueError(f"strength: must not be negative, got {strength}")
        if damping <= 0:
            raise ValueError(f"damping: must be positive, got {damping}")
        self.strength, self.damping, self.definition = strength, damping, definition
        self.own_pull = definition == "avalanche"

    @torch.no_grad()
    def task_end(self, task: Task) -> None:
        if self.path is None or self.anchor is None:
            return
        weights = self.weights()
        gained = self.path / ((weights - self.anchor).square() + self.damping)
        if self.definition == "paper":
            self.importance = gained.relu() + (0.0 if self.importance is None else self.importance)
        else:
            self.total = gained if self.total is None else self.total + gained
            self.importance = self.total.clamp(max=1e-3)
        self.anchor, self.path = weights, None


class RWalk(PathIntegral, Strategy):
    """Riemannian walk: λ Σ_i (F_i + s_i) (θ_i − θ*_i)², a running Fisher diagonal and a score of the path, both scaled.

    F is a running mean of squared gradients of the training batches. Every `interval` steps s grows by the fall of the
    loss that the weight explains, per half of F times its squared change: per distance in the metric of the model's
    answers. Both are divided by their largest value; negative scores count as 0.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    kept = (*PathIntegral.kept, "fisher", "score", "total", "since")
    paper = "Chaudhry et al. 2018, arXiv:1801.10112, Sec. 4"
    fidelity = "mechanism"
    fisher: Tensor | None = None
    score: Tensor | None = None
    total: Tensor | None = None
    since: Tensor | None = None

    def __init__(self, *, strength: float, alpha: float = 0.9, interval: int = 10) -> None:
        """`strength` is λ; at 0 nothing is gathered. `alpha` is the share of the newest squared gradient in F,
        `interval` the steps Δt between two updates of the score; a task's last, shorter interval counts too."""
        if strength < 0:
            raise ValueError(f"strength: must not be negative, got {strength}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: must lie above 0 and not above 1, got {alpha}")
        if interval < 1:
            raise ValueError(f"interval: must be at least 1, got {interval}")
        self.strength, self.alpha, self.interval = strength, alpha, interval

    @torch.no_grad()
    def gradient(self) -> None:
        super().gradient()
        if self.slope is None:
            return
        square = self.slope.square()
        before = square.nan_to_num(nan=0.0, posinf=0.0) if self.fisher is None else self.fisher
        self.fisher = torch.where(square.isfinite(), self.alpha * square + (1 - self.alpha) * before, before)
        if self.since is None:
            self.since, self.score = self.start, torch.zeros_like(square)

    def step_end(self, outcome: StepOutcome) -> None:
        super().step_end(outcome)
        if self.strength and outcome.step % self.interval == 0:
            self._update_score()

    @torch.no_grad()
    def _update_score(self) -> None:
        """Add the fall of the loss since the last update per distance walked since then, and begin anew."""
        assert self.path is not None and self.fisher is not None and self.since is not None and self.score is not None
        weights = self.weights()
        distance = 0.5 * self.fisher * (weights - self.since).square()
        self.score += self.path / (distance + torch.finfo(distance.dtype).eps)
        self.path.zero_()
        self.since = weights

    @torch.no_grad()
    def task_end(self, task: Task) -> None:
        if self.path is None or self.score is None or self.fisher is None:
            return
        self._update_score()
        self.total = self.score if self.total is None else (self.total + self.score) / 2
        self.importance = _scaled(self.fisher) + _scaled(self.total.relu())
        self.anchor, self.path, self.since, self.score = self.since, None, None, None


def _scaled(values: Tensor) -> Tensor:
    """Divided by the largest of them; 0 where all are."""
    return values / values.max().clamp(min=torch.finfo(values.dtype).tiny)
