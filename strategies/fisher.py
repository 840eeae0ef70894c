"""How much each weight matters: the sizes of gradients by row, above all the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.weights import evaluating, flat_parameters
from clplat.streams.base import Task
from clplat.streams.batch import IGNORE, Batch

Scalar = Callable[[Context, Output, Batch], Tensor]
"""What gradients are taken of: a mean over the rows of a batch, ()."""
Labels = Literal["sampled", "observed", "predicted"]
"""Labels of the Fisher information: drawn from the model's answers, those of the data, or the likeliest answers."""
Size = Callable[[Tensor], Tensor]
"""Elementwise: `torch.square`, or `torch.abs`."""


def mean_loss(context: Context, output: Output, batch: Batch) -> Tensor:
    """Mean cross-entropy over what is predicted; 0 for rows that predict nothing."""
    return context.row_loss(output, batch).sum() / (batch.targets != IGNORE).sum().clamp(min=1)


def fisher_diagonal(
    context: Context,
    task: Task,
    *,
    samples: int | None,
    labels: Labels,
    batch_size: int,
    per_sample: bool,
) -> Tensor:
    """Mean of squared gradients of the loss (P,), with `labels` as observed, or drawn from the model's own answers, or
    its likeliest answers."""
    return gradient_sizes(
        context, task, mean_loss, torch.square, samples=samples, labels=labels, batch_size=batch_size,
        per_sample=per_sample,
    )  # fmt: skip


def gradient_sizes(
    context: Context,
    task: Task,
    scalar: Scalar,
    size: Size,
    *,
    samples: int | None,
    batch_size: int,
    per_sample: bool,
    labels: Labels = "observed",
) -> Tensor:
    """Mean of `size` of the gradients of `scalar` (P,) in evaluation mode, over rows, or over batches of `batch_size`.

    `samples` training rows of the task are drawn (None: all of them, in order). Each process takes a part of the
    batches; the result is the same on all. Random numbers come from the run's `strategy` source alone.
    """
    count = len(task.train) if samples is None else min(samples, len(task.train))
    rows = torch.randperm(len(task.train), generator=context.generator)[:count].sort().values
    parts = rows.split(batch_size)
    # One seed a batch, so that what is drawn for it does not depend on the process that works on it.
    seeds = torch.randint(2**62, (len(parts),), generator=context.generator).tolist()
    total = torch.zeros_like(flat_parameters(context.architecture))
    world = context.world
    with evaluating(context.architecture):
        for part, seed in list(zip(parts, seeds, strict=True))[world.rank :: world.size]:
            batch = task.train.batch(part).to(context.device())
            if labels == "sampled":
                batch = _with_sampled_targets(context, batch, torch.Generator().manual_seed(seed))
            elif labels == "predicted":
                batch = _with_predicted_targets(context, batch)
            sizes = _sizes_by_row if per_sample and len(batch) > 1 else _size_of_mean
            total += sizes(context, batch, scalar, size)
    return world.sum(total) / (count if per_sample else len(parts))


def try_gradients_by_row(context: Context, scalar: Scalar, size: Size, *, option: str) -> None:
    """Find out before training, not after the first task, whether the model allows gradients by row."""
    data = context.tasks[0].train
    batch = data.batch(torch.arange(min(2, len(data)))).to(context.device())
    try:
        _sizes_by_row(context, batch, scalar, size)
    except RuntimeError as error:
        raise ValueError(
            f"{option}: {type(context.architecture).__name__} does not allow gradients of several rows at once "
            f"({error}); set it to 1"
        ) from error


def _sizes_by_row(context: Context, batch: Batch, scalar: Scalar, size: Size) -> Tensor:
    """Σ over rows of the size of the row's own gradient, (P,)."""
    weights = {n: p.detach() for n, p in context.architecture.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        one = Batch.from_tensors({name: tensor.unsqueeze(0) for name, tensor in row.items()})
        return scalar(context, functional_call(context.architecture, parameters, (one,)), one)

    # The fused forms of attention have no batching rule; the plain form has.
    with evaluating(context.architecture), sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0))(weights, batch.tensors())
    return torch.cat([size(gradient).sum(0).flatten() for gradient in gradients.values()])


def _size_of_mean(context: Context, batch: Batch, scalar: Scalar, size: Size) -> Tensor:
    weights = [p for p in context.architecture.parameters() if p.requires_grad]
    loss = scalar(context, context.architecture(batch), batch)
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    return torch.cat([size(gradient).flatten() for gradient in gradients])


@torch.no_grad()
def _with_sampled_targets(context: Context, batch: Batch, generator: torch.Generator) -> Batch:
    """Targets drawn from the model's own answers; positions without a target keep none."""
    chances = context.masked(context.architecture(batch), batch).double().softmax(-1).cumsum(-1)
    point = torch.rand(*batch.targets.shape, 1, generator=generator, dtype=torch.float64).to(chances.device)
    drawn = torch.searchsorted(chances, point * chances[..., -1:], right=True).squeeze(-1)
    return batch.replaced(targets=torch.where(batch.targets == IGNORE, IGNORE, drawn))


@torch.no_grad()
def _with_predicted_targets(context: Context, batch: Batch) -> Batch:
    """Targets that the model finds likeliest; positions without a target keep none."""
    likeliest = context.masked(context.architecture(batch), batch).argmax(-1)
    return batch.replaced(targets=torch.where(batch.targets == IGNORE, IGNORE, likeliest))
