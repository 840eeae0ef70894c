"""A model's trainable weights as one vector, P of them: read, moved, their gradients; and a model that is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def flat_parameters(architecture: nn.Module) -> Tensor:
    """All trainable weights as one vector (P,), in float32 at least: one operation in place of one for each tensor.

    Of weights that are sharded over processes this one's share, in the same order."""
    weights = [p for p in architecture.parameters() if p.requires_grad]
    flat = torch.cat([(p.to_local() if isinstance(p, DTensor) else p).flatten() for p in weights])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def is_sharded(architecture: nn.Module) -> bool:
    """Whether this process holds a share of the weights only."""
    return any(isinstance(weight, DTensor) for weight in architecture.parameters())


def held_part(architecture: nn.Module, flat: Tensor) -> Tensor:
    """Of a vector (P,) over all trainable weights the entries of `flat_parameters`: all, unless they are sharded.

    Shards are consecutive rows, as many on every process but the last ones (torch's `fully_shard`)."""
    if not is_sharded(architecture):
        return flat
    weights = [p for p in architecture.parameters() if p.requires_grad]
    parts = []
    for weight, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        if isinstance(weight, DTensor):
            rows = -(-weight.shape[0] // weight.device_mesh.size())
            first = weight.device_mesh.get_local_rank() * rows
            part = part.view(weight.shape)[first : first + rows].flatten()
        parts.append(part)
    return torch.cat(parts)


def flat_gradients(architecture: nn.Module) -> Tensor:
    """The `.grad` of all trainable weights as one vector (P,) like `flat_parameters`, 0 where there is none."""
    weights = [p for p in architecture.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


@torch.no_grad()
def move_weights(model: nn.Module, target: Tensor, share: Tensor | float) -> None:
    """The trainable weights w of `model`, in place: w ← w + share ⊙ (target − w), `target` (P,)."""
    flat = flat_parameters(model)
    assign_weights(model, flat + share * (target - flat))


@torch.no_grad()
def assign_weights(model: nn.Module, flat: Tensor) -> None:
    """The trainable weights of `model` become `flat` (P,)."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        weight.copy_(part.view_as(weight))


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
