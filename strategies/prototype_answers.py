"""Answers from the nearest mean of remembered rows, beside any way of training: what its features are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clplat.strategies.base import Context
from clplat.strategies.exemplars import remember_exemplars
from clplat.strategies.nearest_mean import NearestMean
from clplat.strategies.replay import _Rehearsal, rows_of_all_classes
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class PrototypeAnswers(_Rehearsal):
    """Keep some rows of every class, and answer with the class whose rows' mean feature is nearest.

    Training is left alone. It is a control: beside `Joint`, say, it tells what a method gains by its training from what
    it gains by answering with prototypes and not with a linear head.
    """

    paper = "Rebuffi et al. 2017, arXiv:1611.07725, Algorithms 1 and 4"
    fidelity = "mechanism"

    def __init__(self, *, per_class: int = 5) -> None:
        """`per_class` rows, chosen by herding when a task ends; beside `Joint`, of all tasks when it ends."""
        if per_class < 1:
            raise ValueError(f"per_class: at least 1 row of each class, got {per_class}")
        super().__init__(capacity=per_class, capacity_bytes=None, policy="class_balanced")
        self.per_class, self.ended = per_class, 0

    def setup(self, context: Context) -> None:
        self.capacity = rows_of_all_classes(context, self.per_class, option="PrototypeAnswers.per_class")
        super().setup(context)
        self.nearest = NearestMean(context, self.buffer, "PrototypeAnswers")

    def task_end(self, task: Task) -> None:
        for trained in self.context.tasks[self.ended : task.index + 1]:
            remember_exemplars(self.context, self.buffer, trained, self.per_class)
        self.ended = task.index + 1

    def prepare_predict(self) -> None:
        self.nearest.prepare()

    def predict(self, batch: Batch) -> Tensor:
        return self.nearest.logits(batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ended": self.ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.ended = state["ended"]
