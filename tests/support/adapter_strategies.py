"""A strategy that asks a model for its adapters: one for each task, the others frozen and out of use."""

from __future__ import annotations

from clplat.architectures.base import Adapters
from clplat.strategies.base import Strategy
from clplat.streams.base import Task


class OneForEachTask(Strategy):
    """Every task trains an adapter of its own, and the last one answers."""

    def task_start(self, task: Task) -> None:
        model = self.context.architecture
        assert isinstance(model, Adapters)
        name = f"task{task.index}"
        model.add_adapter(name)
        model.use_adapters([name])
