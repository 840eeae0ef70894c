"""A reference with task identity: an adapter for every task, and each task answered by its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from clplat.strategies.adapters import adapters_of, first_adapter, new_adapter, refuse_numbers_by_weight
from clplat.strategies.base import Context, Strategy
from clplat.streams.base import Task


class AdapterPerTask(Strategy):
    """Every task trains an adapter of its own on the bare backbone, and its sets are answered with that adapter ("ONE"
    in I-LoRA's program). Nothing is forgotten and nothing passed on.

    Task-incremental: an evaluation is told which task a set belongs to, which no other arm here is. A task that is
    still to come is answered by the backbone alone, a probe by the adapter of the last task.
    """

    reference: ClassVar[bool] = True
    restarts: ClassVar[bool] = True
    paper = "Ren et al. 2024, arXiv:2402.18865"

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.model = adapters_of(context, "AdapterPerTask")
        self.first = first_adapter(context, "AdapterPerTask")
        refuse_numbers_by_weight(context, "AdapterPerTask")
        self.own: dict[int, str] = {}

    def task_start(self, task: Task) -> None:
        adapter = f"task{task.index}" if self.own else self.first
        if self.own:
            new_adapter(self.context, adapter)
            self.model.use_adapters([adapter])
        self.own[task.index] = adapter

    def told(self, task: Task) -> AbstractContextManager[None]:
        return self.model.answering(*([self.own[task.index]] if task.index in self.own else []))

    def state_dict(self) -> dict[str, Any]:
        return {"own": dict(self.own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.own = dict(state["own"])
