"""Locas as a continual learner: memories beside the layers learn a task, and the backbone never does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from clplat.architectures.base import SideMemories
from clplat.strategies.adapters import new_adapter, refuse_numbers_by_weight
from clplat.strategies.base import Context, Strategy
from clplat.streams.base import Task
from clplat.streams.batch import Batch

AfterTask = Literal["keep_one", "stack", "permanentize", "fresh"]


class Locas(Strategy):
    """Begins a memory on the first batch of a task, trains it alone, and decides what becomes of it behind the task.

    `after_task` (INFERRED, the paper reads one text): `keep_one`, the same slots learn on; `stack`, they are frozen and
    go on answering, and the next task gets as many more; `permanentize`, the same, but they become a part of the model,
    which no view takes away; `fresh`, they forget, and are begun anew. What a memory begins as, its rank and clipping
    are options of the architecture (`LocasModel.memory`).
    """

    paper = "Lu et al. 2026, arXiv:2602.05085"
    fidelity = "interpretation"
    begins_memories = True

    def __init__(self, *, after_task: AfterTask = "keep_one") -> None:
        if after_task not in get_args(AfterTask):
            raise ValueError(f"after_task: must be one of {', '.join(get_args(AfterTask))}, got {after_task!r}")
        self.after_task = after_task
        self.begun = False

    def setup(self, context: Context) -> None:
        """Refuse an architecture without side memories, and strategies that need the same ones in all tasks."""
        super().setup(context)
        if not isinstance(context.architecture, SideMemories):
            raise ValueError(f"Locas: {type(context.architecture).__name__} has no side memories; put it into "
                             "LocasModel, as its `model`")  # fmt: skip
        if self.after_task != "keep_one" or any(other.restarts for other in context.strategies.values()):
            refuse_numbers_by_weight(context, "Locas")

    def task_start(self, task: Task) -> None:
        """A memory for the task, where it does not go on with the last one's."""
        if self.after_task == "keep_one" or not self.context.past:
            return
        model, self.begun = self._model(), False
        if self.after_task == "fresh":
            model.forget_memory(self._memory())
            return
        name = f"memory{task.index}"
        new_adapter(self.context, name)
        model.use_adapters([*model.active, name], [name])

    def batch(self, batch: Batch) -> Batch:
        """On the first batch of a memory, that of all processes: begin it."""
        if not self.begun:
            world, model, memory = self.context.world, self._model(), self._memory()
            whole = Batch.from_tensors({name: world.gather(tensor) for name, tensor in batch.tensors().items()})
            model.begin_memory(memory, whole, self.context.generator)
            for tensor in model.adapter_parameters(memory).values():
                world.broadcast(tensor.data)  # sums of a GPU, and what is chosen by them, may differ
            self.begun = True
        return batch

    def task_end(self, task: Task) -> None:
        if self.after_task == "permanentize":
            self._model().make_permanent(self._memory())

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begun = state["begun"]

    def _memory(self) -> str:
        """The one that is trained now."""
        (name,) = self._model().trained
        return name

    def _model(self) -> SideMemories:
        model = self.context.architecture
        assert isinstance(model, SideMemories), "checked at setup"
        return model
