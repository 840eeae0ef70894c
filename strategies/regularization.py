"""Quadratic penalties that hold weights near where earlier tasks left them, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from clplat.architectures.base import Output
from clplat.strategies.base import Context, Strategy
from clplat.streams.base import Task
from clplat.streams.batch import IGNORE, Batch

Labels = Literal["sampled", "observed"]


class EWC(Strategy):
    """Elastic weight consolidation: λ/2 Σ_tasks Σ_i F_i (θ_i − θ*_i)².

    The sum over tasks is kept as one quadratic, exactly: two quadratics around different anchors are one around
    their mean weighted by importance, plus a constant. Memory does not grow with the number of tasks.
    """

    knobs = ("strength",)
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
        """`strength` is λ. The Fisher diagonal is the mean over `fisher_samples` rows (None: all) of squared
        gradients of each row's loss (`per_sample`; for token rows the mean loss of the row), with `labels` drawn
        from the model (the true Fisher) or as observed (the empirical one). `batch` squares the gradient of each
        batch's mean loss instead, which is what Avalanche computes."""
        if strength < 0:
            raise ValueError(f"strength: must not be negative, got {strength}")
        self.strength, self.fisher_samples, self.fisher, self.labels = strength, fisher_samples, fisher, labels
        self.fisher_batch_size = fisher_batch_size
        self.importance: Tensor | None = None
        self.anchor: Tensor | None = None
        self.constant = 0.0

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        if self.importance is None or self.anchor is None or not self.strength:
            return None
        moved = flat_parameters(self.context) - self.anchor
        return 0.5 * self.strength * ((self.importance * moved.square()).sum() + self.constant)

    def task_end(self, task: Task) -> None:
        if self.strength:
            with torch.no_grad():
                self.consolidate(self.estimate(task), flat_parameters(self.context).clone())

    def consolidate(self, importance: Tensor, weights: Tensor) -> None:
        """Add the quadratic of one task to the sum."""
        if self.importance is None or self.anchor is None:
            self.importance, self.anchor = importance, weights
            return
        total = self.importance + importance
        share = torch.where(total > 0, importance / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
        apart = weights - self.anchor
        self.constant += float((self.importance * share * apart.square()).sum())
        self.importance, self.anchor = total, self.anchor + share * apart

    def estimate(self, task: Task) -> Tensor:
        """The Fisher diagonal (P,) on the task's training rows, in evaluation mode."""
        architecture = self.context.architecture
        modes = architecture.training
        architecture.eval()
        estimated = fisher_diagonal(
            self.context, task, samples=self.fisher_samples, labels=self.labels,
            batch_size=self.fisher_batch_size, per_sample=self.fisher == "per_sample",
        )  # fmt: skip
        architecture.train(modes)
        return estimated

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self.importance, "anchor": self.anchor, "constant": self.constant}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.context.device()
        self.importance, self.anchor = (
            None if state[name] is None else state[name].to(device) for name in ("importance", "anchor")
        )
        self.constant = state["constant"]


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
        self.decay = decay

    def consolidate(self, importance: Tensor, weights: Tensor) -> None:
        self.importance = importance if self.importance is None else self.decay * self.importance + importance
        self.anchor = weights


def flat_parameters(context: Context) -> Tensor:
    """All trainable weights as one vector (P,): one multiplication instead of one for each tensor."""
    return torch.cat([p.flatten() for p in context.architecture.parameters() if p.requires_grad])


def fisher_diagonal(
    context: Context, task: Task, *, samples: int | None, labels: Labels, batch_size: int, per_sample: bool
) -> Tensor:
    """Mean of squared gradients (P,), over rows or over batches of `batch_size` rows."""
    count = len(task.train) if samples is None else min(samples, len(task.train))
    rows = torch.randperm(len(task.train), generator=context.generator)[:count].sort().values
    parts = rows.split(batch_size)
    total = torch.zeros_like(flat_parameters(context))
    for part in parts:
        batch = task.train.batch(part).to(context.device())
        if labels == "sampled":
            batch = _with_sampled_targets(context, batch)
        total += _squares_by_row(context, batch) if per_sample else _square_of_mean(context, batch)
    return total / (count if per_sample else len(parts))


def _with_sampled_targets(context: Context, batch: Batch) -> Batch:
    """Targets drawn from the model's own answers; positions without a target keep none."""
    chances = context.masked(context.architecture(batch), batch).float().softmax(-1).cpu()
    drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=context.generator)
    drawn = drawn.view(batch.targets.shape).to(batch.targets.device)
    return batch.replaced(targets=torch.where(batch.targets == IGNORE, IGNORE, drawn))


def _squares_by_row(context: Context, batch: Batch) -> Tensor:
    weights = {n: p.detach() for n, p in context.architecture.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        one = Batch.from_tensors({name: tensor.unsqueeze(0) for name, tensor in row.items()})
        output: Output = functional_call(context.architecture, parameters, (one,))
        return context.loss(output, one)

    # Attention has no batching rule for its fused forms; the plain form has.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0))(weights, batch.tensors())
    return torch.cat([gradient.square().sum(0).flatten() for gradient in gradients.values()])


def _square_of_mean(context: Context, batch: Batch) -> Tensor:
    weights = [p for p in context.architecture.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = context.loss(context.architecture(batch), batch)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.square().flatten() for gradient in gradients])
