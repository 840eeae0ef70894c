"""Quadratic penalties that hold weights near where earlier tasks left them, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context, Strategy
from clplat.strategies.fisher import fisher_diagonal, flat_parameters, squares_by_row
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class EWC(Strategy):
    """Elastic weight consolidation: λ/2 Σ_tasks Σ_i F_i (θ_i − θ*_i)².

    The sum over tasks is kept as one quadratic, exactly: two quadratics around different anchors are one around
    their mean weighted by importance, plus a constant. Memory does not grow with the number of tasks.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    paper = "Kirkpatrick et al. 2017, arXiv:1612.00796, Eq. 3"
    fidelity = "exact"

    def __init__(
        self,
        *,
        strength: float,
        fisher_samples: int | None = 256,
        fisher: Literal["per_sample", "batch"] = "per_sample",
        labels: Literal["sampled", "observed"] = "sampled",
        fisher_batch_size: int = 16,
    ) -> None:
        """`strength` is λ; at 0 no importance is estimated either. The Fisher diagonal is the mean over
        `fisher_samples` rows (None: all) of the squared gradient of each row's loss (for token rows the mean over
        its tokens), with `labels` drawn from the model (the true Fisher) or as observed (the empirical one).
        `fisher="batch"` squares the gradient of each batch's mean loss instead, which is what Avalanche computes.
        `fisher_batch_size` rows are worked on at once, with a gradient each: lower it when memory is short; at 1
        rows go one by one, without the `vmap` that some models do not allow."""
        if strength < 0:
            raise ValueError(f"strength: must not be negative, got {strength}")
        if fisher_batch_size < 1 or (fisher_samples is not None and fisher_samples < 1):
            raise ValueError("fisher_samples, fisher_batch_size: must be at least 1, "
                             f"got {fisher_samples} and {fisher_batch_size}")  # fmt: skip
        self.strength, self.fisher_samples, self.fisher, self.labels = strength, fisher_samples, fisher, labels
        self.fisher_batch_size = fisher_batch_size
        self.importance: Tensor | None = None
        self.anchor: Tensor | None = None
        self.constant = 0.0

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.strength and self.fisher == "per_sample" and self.fisher_batch_size > 1:
            self._try_vmap()

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        if self.importance is None or not self.strength:
            return None
        quadratic = _Quadratic.apply(self._weights(), self.importance, self.anchor)
        return 0.5 * self.strength * (quadratic + self.constant)

    def task_end(self, task: Task) -> None:
        if self.strength:
            importance = fisher_diagonal(
                self.context, task, samples=self.fisher_samples, labels=self.labels,
                batch_size=self.fisher_batch_size, per_sample=self.fisher == "per_sample",
            )  # fmt: skip
            self.consolidate(importance, self._weights().detach().clone())

    def consolidate(self, importance: Tensor, weights: Tensor) -> None:
        """Add the quadratic of one task to the sum."""
        if self.importance is None or self.anchor is None:
            self.importance, self.anchor = importance, weights
            return
        total = self.importance + importance
        share = torch.where(total > 0, importance / total, 0.0)
        apart = weights - self.anchor
        self.constant += float((self.importance * share * apart.square()).sum())
        self.importance, self.anchor = total, self.anchor + share * apart

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self.importance, "anchor": self.anchor, "constant": self.constant}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.context.device()
        self.importance, self.anchor = (
            None if state[name] is None else state[name].to(device, copy=True) for name in ("importance", "anchor")
        )
        self.constant = state["constant"]

    def _weights(self) -> Tensor:
        flat = flat_parameters(self.context.architecture)
        if self.anchor is not None and len(flat) != len(self.anchor):
            raise ValueError(f"{type(self).__name__}: the architecture went from {len(self.anchor)} trainable weights "
                             f"to {len(flat)} between tasks; use one that does not grow")  # fmt: skip
        return flat

    def _try_vmap(self) -> None:
        """Find out before training, not after the first task, whether the model allows gradients by row."""
        data = self.context.tasks[0].train
        batch = data.batch(torch.arange(min(2, len(data)))).to(self.context.device())
        try:
            squares_by_row(self.context, batch)
        except RuntimeError as error:
            raise ValueError(
                f"{type(self).__name__}.fisher_batch_size: {type(self.context.architecture).__name__} does not allow "
                f"gradients of several rows at once ({error}); set it to 1"
            ) from error


class OnlineEWC(EWC):
    """Online elastic weight consolidation: one running importance that fades, anchored at the latest weights."""

    knobs = ("strength", "decay")
    paper = "Schwarz et al. 2018, arXiv:1805.06370, Eq. 9"

    def __init__(
        self,
        *,
        strength: float,
        decay: float = 1.0,
        fisher_samples: int | None = 256,
        fisher: Literal["per_sample", "batch"] = "per_sample",
        labels: Literal["sampled", "observed"] = "sampled",
        fisher_batch_size: int = 16,
    ) -> None:
        """`decay` is the factor γ on the importance of earlier tasks at every boundary; the rest as in `EWC`."""
        super().__init__(
            strength=strength, fisher_samples=fisher_samples, fisher=fisher, labels=labels,
            fisher_batch_size=fisher_batch_size,
        )  # fmt: skip
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: must lie between 0 and 1, got {decay}")
        self.decay = decay

    def consolidate(self, importance: Tensor, weights: Tensor) -> None:
        self.importance = importance if self.importance is None else self.decay * self.importance + importance
        self.anchor = weights


class _Quadratic(torch.autograd.Function):
    """Σ_i F_i (θ_i − θ*_i)² with its gradient kept from the forward pass: half the passes over the weights."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, importance: Tensor, anchor: Tensor) -> Tensor:
        moved = weights - anchor
        pull = importance * moved
        ctx.save_for_backward(pull)
        return torch.dot(pull, moved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return 2 * grad * ctx.saved_tensors[0], None, None
