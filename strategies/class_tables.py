"""Which classes have been met when."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.strategies.base import Context


def classes_seen(context: Context, name: str) -> Tensor:
    """Truth table (T, C) on the learner's device: row t are the classes of task t and of those before it.

    Raises ValueError in the name of the strategy `name` where tasks have no classes.
    """
    if context.spec.kind == "language" or any(task.classes is None for task in context.tasks):
        raise ValueError(f"{name}: the tasks of this stream have no classes to tell apart; use ExperienceReplay")
    seen = torch.zeros(len(context.tasks), context.spec.num_outputs, dtype=torch.bool)
    for task in context.tasks:
        seen[task.index :, list(task.classes or ())] = True
    return seen.to(context.device())
