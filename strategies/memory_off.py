"""A further reading of a model with test-time memories: what it answers when they write nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from clplat.architectures.base import WritesMemory
from clplat.strategies.base import Context, Strategy


class MemoryOff(Strategy):
    """Every evaluation has a further view, `memory_off`, in which all memories stay as they begin. The difference from
    the default view is what memory is worth to the trained model. Training does not notice."""

    def setup(self, context: Context) -> None:
        """Refuse an architecture that has no memories to silence."""
        super().setup(context)
        architecture = context.architecture
        if not isinstance(architecture, WritesMemory) or not architecture.writes_memory():
            raise ValueError(f"MemoryOff: {type(architecture).__name__} has no memories that write")

    def views(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        architecture = self.context.architecture
        assert isinstance(architecture, WritesMemory), "checked at setup"
        return {"memory_off": architecture.without_writes}
