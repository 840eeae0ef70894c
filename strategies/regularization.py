"""Penalties whose importances are measured at the end of a task: EWC, OnlineEWC, MAS."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context, Strategy
from clplat.strategies.fisher import Labels, fisher_diagonal, gradient_sizes, mean_loss, try_gradients_by_row
from clplat.strategies.quadratic import QuadraticPenalty
from clplat.streams.base import Task
from clplat.streams.batch import IGNORE, Batch


class EWC(QuadraticPenalty, Strategy):
    """Elastic weight consolidation: λ/2 Σ_tasks Σ_i F_i (θ_i − θ*_i)².

    The sum over tasks is kept as one quadratic, exactly: two quadratics around different anchors are one around
    their mean weighted by importance, plus a constant. Memory does not grow with the number of tasks.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    shards: ClassVar[bool] = True
    factor = 0.5
    paper = "Kirkpatrick et al. 2017, arXiv:1612.00796, Eq. 3"
    fidelity = "exact"

    def __init__(
        self,
        *,
        strength: float,
        fisher_samples: int | None = 256,
        fisher: Literal["per_sample", "batch"] = "per_sample",
        labels: Labels = "sampled",
        fisher_batch_size: int = 16,
    ) -> None:
        """`strength` is λ; at 0 no importance is estimated either. The Fisher diagonal is the mean over
        `fisher_samples` rows (None: all) of the squared gradient of each row's loss (for token rows the mean over
        its tokens), with `labels` drawn from the model (the true Fisher), as observed (the empirical one) or those
        that the model predicts, whose gradients are smaller.
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

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.strength and self.fisher == "per_sample" and self.fisher_batch_size > 1:
            option = f"{type(self).__name__}.fisher_batch_size"
            try_gradients_by_row(context, mean_loss, torch.square, option=option)

    def task_end(self, task: Task) -> None:
        if self.strength:
            importance = fisher_diagonal(
                self.context, task, samples=self.fisher_samples, labels=self.labels,
                batch_size=self.fisher_batch_size, per_sample=self.fisher == "per_sample",
            )  # fmt: skip
            self.consolidate(importance, self.weights().detach())

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
        labels: Labels = "sampled",
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


class MAS(QuadraticPenalty, Strategy):
    """Memory aware synapses: weights that change the length of the answer most are held, whatever the labels.

    λ Σ_i Ω_i (θ_i − θ*_i)², with Ω the mean over the task's rows of |∂‖f(x)‖²/∂θ_i|, anchored at the latest weights.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    paper = "Aljundi et al. 2018, arXiv:1711.09601, Sec. 4.1"
    fidelity = "exact"

    def __init__(
        self,
        *,
        strength: float,
        samples: int | None = None,
        gradients: Literal["per_sample", "batch"] = "per_sample",
        batch_size: int = 16,
        average: float | None = None,
    ) -> None:
        """`strength` is λ; at 0 no importance is estimated either. Gradients are taken over `samples` rows (None:
        all). `gradients="batch"` takes the absolute gradient of the mean over each batch instead of the mean over
        rows: Avalanche's. `batch_size` rows are worked on at once; at 1 they go one by one, without the `vmap` that
        some models do not allow. Importances of several tasks are added, as in the paper; with `average` α they are
        α × the earlier ones + (1 − α) × the new one: Avalanche's, with α 0.5."""
        if strength < 0:
            raise ValueError(f"strength: must not be negative, got {strength}")
        if batch_size < 1 or (samples is not None and samples < 1):
            raise ValueError(f"samples, batch_size: must be at least 1, got {samples} and {batch_size}")
        if average is not None and not 0 <= average <= 1:
            raise ValueError(f"average: must lie between 0 and 1, got {average}")
        self.strength, self.samples, self.gradients = strength, samples, gradients
        self.batch_size, self.average = batch_size, average

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.strength and self.gradients == "per_sample" and self.batch_size > 1:
            try_gradients_by_row(context, squared_length, torch.abs, option=f"{type(self).__name__}.batch_size")

    def task_end(self, task: Task) -> None:
        if not self.strength:
            return
        new = gradient_sizes(
            self.context, task, squared_length, torch.abs, samples=self.samples, batch_size=self.batch_size,
            per_sample=self.gradients == "per_sample",
        )  # fmt: skip
        if self.importance is None:
            self.importance = new
        elif self.average is None:
            self.importance = self.importance + new
        else:
            self.importance = self.average * self.importance + (1 - self.average) * new
        self.anchor = self.weights().detach()


def squared_length(context: Context, output: Output, batch: Batch) -> Tensor:
    """Mean of ‖logits‖² over what is predicted, among the classes that the scenario shows."""
    shown = context.masked(output, batch)
    lengths = shown.masked_fill(shown.isinf(), 0.0).square().sum(-1)
    counted = batch.targets != IGNORE
    return (lengths * counted).sum() / counted.sum().clamp(min=1)
