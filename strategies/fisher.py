"""The diagonal of the Fisher information: how much each weight matters for what the model answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.streams.base import Task
from clplat.streams.batch import IGNORE, Batch


def flat_parameters(architecture: nn.Module) -> Tensor:
    """All trainable weights as one vector (P,), in float32 at least: one operation in place of one for each tensor."""
    flat = torch.cat([p.flatten() for p in architecture.parameters() if p.requires_grad])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def fisher_diagonal(
    context: Context,
    task: Task,
    *,
    samples: int | None,
    labels: Literal["sampled", "observed"],
    batch_size: int,
    per_sample: bool,
) -> Tensor:
    """Mean of squared gradients (P,) in evaluation mode, over rows, or over batches of `batch_size` rows.

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
            squares = squares_by_row if per_sample and len(batch) > 1 else _square_of_mean
            total += squares(context, batch)
    return world.sum(total) / (count if per_sample else len(parts))


def squares_by_row(context: Context, batch: Batch) -> Tensor:
    """Σ over rows of the squared gradient of the row's loss, (P,)."""
    weights = {n: p.detach() for n, p in context.architecture.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        one = Batch.from_tensors({name: tensor.unsqueeze(0) for name, tensor in row.items()})
        return _mean_loss(context, functional_call(context.architecture, parameters, (one,)), one)

    # The fused forms of attention have no batching rule; the plain form has.
    with evaluating(context.architecture), sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0))(weights, batch.tensors())
    return torch.cat([gradient.square().sum(0).flatten() for gradient in gradients.values()])


def _square_of_mean(context: Context, batch: Batch) -> Tensor:
    weights = [p for p in context.architecture.parameters() if p.requires_grad]
    loss = _mean_loss(context, context.architecture(batch), batch)
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    return torch.cat([gradient.square().flatten() for gradient in gradients])


def _mean_loss(context: Context, output: Output, batch: Batch) -> Tensor:
    """Mean cross-entropy over what is predicted; 0 for rows that predict nothing."""
    return context.row_loss(output, batch).sum() / (batch.targets != IGNORE).sum().clamp(min=1)


@torch.no_grad()
def _with_sampled_targets(context: Context, batch: Batch, generator: torch.Generator) -> Batch:
    """Targets drawn from the model's own answers; positions without a target keep none."""
    chances = context.masked(context.architecture(batch), batch).double().softmax(-1).cumsum(-1)
    point = torch.rand(*batch.targets.shape, 1, generator=generator, dtype=torch.float64).to(chances.device)
    drawn = torch.searchsorted(chances, point * chances[..., -1:], right=True).squeeze(-1)
    return batch.replaced(targets=torch.where(batch.targets == IGNORE, IGNORE, drawn))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off and running statistics used, and every part's own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
