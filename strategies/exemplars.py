"""Exemplars: the rows of a class that bring their mean nearest to the class's own, chosen by herding.

Source: Rebuffi et al. 2017, arXiv:1611.07725, Algorithm 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.strategies.base import Context
from clplat.strategies.buffers import Buffer
from clplat.strategies.nearest_mean import unit_length
from clplat.strategies.weights import evaluating
from clplat.streams.base import Task


def remember_exemplars(context: Context, buffer: Buffer, task: Task, count: int) -> None:
    """Offer the `count` best exemplars of each of the task's classes to a buffer that keeps rows of lowest rank."""
    rows, ranks = exemplars(context, task, count)
    world, device = context.world, context.device()
    own = slice(world.rank, len(rows) // world.size * world.size, world.size)
    buffer.add(task.train.batch(rows[own]).to(device), priority=ranks[own].to(device))


@torch.no_grad()
def exemplars(context: Context, task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Row numbers of the `count` best exemplars of each of the task's classes, and their ranks from 0, on the CPU."""
    features, labels = [], []
    with evaluating(context.architecture):
        for batch in context.batches(task.train, 256):
            features.append(unit_length(context.architecture(batch, return_hidden="last")))
            labels.append(batch.targets)
    all_features, all_labels = torch.cat(features), torch.cat(labels)
    members = [(all_labels == label).nonzero().flatten() for label in task.classes or ()]
    order = [rows[herded(all_features[rows], count)].cpu() for rows in members]
    return torch.cat(order), torch.cat([torch.arange(len(rows), dtype=torch.float64) for rows in order])


def herded(features: Tensor, count: int) -> Tensor:
    """Numbers of at most `count` rows of `features` (N, H), each the one that brings the mean of those chosen so far
    nearest to the mean of all (Algorithm 4); no row twice."""
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.zeros(len(features), device=features.device)
    chosen = []
    for number in range(1, min(count, len(features)) + 1):
        apart = (number * mean - total - features).square().sum(1) + left
        best = apart.argmin()
        chosen.append(best)
        total, left[best] = total + features[best], torch.inf
    return torch.stack(chosen)
