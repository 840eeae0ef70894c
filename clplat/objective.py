"""The default objective: cross-entropy, summed over origins as weight × mean, with classes hidden by scenario."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Output
from clplat.streams.base import Spec, Task
from clplat.streams.batch import AUXILIARY, IGNORE, Batch


class Objective(nn.Module):
    """Cross-entropy for classification and language alike; a module so that its table follows the device.

    In the `task` scenario each row is answered among its own task's classes, in training and in evaluation. In the
    `class` scenario training sees the whole head and evaluation the classes met so far, as most papers do. A language
    hides no token: where labels are text, their scorer asks for the classes seen. The losses of several questions about
    one sample (`spec.heads`) add up; those of a row's tokens are averaged.
    """

    def __init__(self, spec: Spec, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.spec = spec
        self.scenario = spec.scenario if spec.kind == "classify" else None
        self.classes = [task.classes or () for task in tasks]
        table = torch.ones(len(tasks), spec.num_outputs, dtype=torch.bool)
        if self.scenario in ("task", "class"):
            for task in tasks:
                table[task.index] = False
                table[task.index, list(task.classes or ())] = True
        self.register_buffer("task_classes", table, persistent=False)
        self.task_classes: Tensor

    def masked(self, output: Output, batch: Batch) -> Tensor:
        """Training logits with classes outside the row's task hidden, where the scenario is `task`."""
        if self.scenario != "task":
            return output.logits
        return output.logits.masked_fill(~self.task_classes[batch.task], float("-inf"))

    def seen(self, output: Output, batch: Batch, tasks_seen: Sequence[int]) -> Tensor:
        """Evaluation logits: among the row's task's classes, or among the classes of the tasks seen."""
        if self.scenario != "class":
            return self.masked(output, batch)
        visible = self.task_classes[list(tasks_seen)].any(0)
        return output.logits.masked_fill(~visible, float("-inf"))

    def classes_of(self, tasks_seen: Sequence[int]) -> list[int]:
        """The classes that some tasks introduce, each once, in rising order."""
        return sorted({unit for index in tasks_seen for unit in self.classes[index]})

    def row_loss(self, output: Output, batch: Batch) -> Tensor:
        """Cross-entropy of every prediction in nats, (B,) or (B, T); 0 where the target is ignored."""
        found = F.cross_entropy(*self._asked(output, batch), reduction="none", ignore_index=IGNORE)
        if output.predicted is not None:
            found = found.new_zeros(batch.targets.numel()).index_copy(0, output.predicted, found)
        return found.view_as(batch.targets)

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Σ over origins of weight × mean; the mean counts a row's predictions, not its weight."""
        if batch.origin is None and self.spec.heads is not None:
            return self.row_loss(output, batch).sum(1).mean()
        if batch.origin is None:
            return F.cross_entropy(*self._asked(output, batch), ignore_index=IGNORE)
        return self.by_origin(output, batch).sum()

    def by_origin(self, output: Output, batch: Batch) -> Tensor:
        """Weight × mean over the current and over the replayed rows, (2,)."""
        assert batch.origin is not None
        loss = self.row_loss(output, batch)
        # A sum of bfloat16 numbers would no longer count from 256 on.
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        weight = batch.weight if batch.weight is not None else torch.ones_like(batch.origin, dtype=loss.dtype)
        counted = (batch.targets != IGNORE).to(loss.dtype)
        if loss.ndim > 1:
            loss, counted = loss.sum(1), counted.sum(1) if self.spec.heads is None else torch.ones_like(counted[:, 0])
        sums = loss.new_zeros(AUXILIARY + 1).index_add(0, batch.origin, loss * weight)
        counts = loss.new_zeros(AUXILIARY + 1).index_add(0, batch.origin, counted)
        return (sums / counts.clamp(min=1))[:AUXILIARY]

    def _asked(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and targets (N,) of all predictions, or of those that the model has made."""
        logits, targets = self.masked(output, batch).flatten(0, batch.targets.ndim - 1), batch.targets.flatten()
        if output.predicted is None:
            return logits, targets
        return logits.index_select(0, output.predicted), targets.index_select(0, output.predicted)
