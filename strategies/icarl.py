"""Exemplars chosen by herding, distillation of the network before, and answers from the nearest mean of exemplars."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Architecture, Output, StepOutcome
from clplat.strategies.base import Context
from clplat.strategies.class_tables import classes_seen
from clplat.strategies.exemplars import remember_exemplars
from clplat.strategies.nearest_mean import NearestMean
from clplat.strategies.replay import ExperienceReplay
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class iCaRL(ExperienceReplay):  # noqa: N801 - the method's own name
    """Incremental classifier and representation learning: every class is held by its most typical rows.

    Outputs are independent sigmoids: those of earlier classes are held to what the network before the task answers, the
    others to the label, on current rows and exemplars alike. Rows come into the buffer at the end of their task, in
    the order in which they bring the mean of the exemplars nearest to the class's; equal shares are cut from its end.
    Classes of the current task have no exemplars, and so are not answered, before it ends.
    """

    paper = "Rebuffi et al. 2017, arXiv:1611.07725, Algorithms 1-5"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        ratio: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        """`capacity` (rows) or `capacity_bytes` of all exemplars; `ratio` of them for each current row, each with
        `weight` in the mean over all rows."""
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy="class_balanced", ratio=ratio, weight=weight
        )

    def setup(self, context: Context) -> None:
        self.seen = classes_seen(context, "iCaRL")
        if int(self.seen[-1].sum()) != sum(len(task.classes or ()) for task in context.tasks):
            raise ValueError("iCaRL: tasks share classes, and it holds every class of an earlier task to the network's "
                             "old answers; use the scenario class or task")  # fmt: skip
        super().setup(context)
        self.nearest = NearestMean(context, self.buffer, "iCaRL")
        self.previous: Architecture | None = None

    def objective(self, output: Output, batch: Batch) -> Tensor:
        task, past = self.context.task, self.context.past
        assert task is not None
        wanted = F.one_hot(batch.targets, output.logits.shape[-1]).float()
        if self.previous is not None:
            with torch.no_grad():
                answered = self.previous(batch).logits.float().sigmoid()
            wanted = torch.where(self.seen[past[-1].index], answered, wanted)
        surprise = F.binary_cross_entropy_with_logits(output.logits.float(), wanted, reduction="none")
        rows = (surprise * self.seen[task.index]).sum(-1)
        return rows.mean() if batch.weight is None else (rows * batch.weight).sum() / batch.weight.sum()

    def step_end(self, outcome: StepOutcome) -> None:
        self.fresh.clear()

    def task_end(self, task: Task) -> None:
        remember_exemplars(self.context, self.buffer, task, self.buffer.capacity)
        self.previous = copy.deepcopy(self.context.architecture).eval().requires_grad_(False)

    def prepare_predict(self) -> None:
        self.nearest.prepare()

    def predict(self, batch: Batch) -> Tensor:
        return self.nearest.logits(batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous": None if self.previous is None else self.previous.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.context.architecture).eval().requires_grad_(False)
            self.previous.load_state_dict(state["previous"])
