"""A recorder of kernels that needs no GPU: it writes operations down with the tensors that they read and
wrote, and runs them again on these. What Python does beside them happens once, as with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from no_questions import NoQuestions
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class _Waits(TorchDispatchMode):
    """Refuses operations that would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in NoQuestions.asking:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Written(_Waits):
    """Writes operations down, and what they changed before they did."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self.changed: list[tuple[Tensor, Tensor]] = []
        """In-place operations are undone: a capture on a GPU runs nothing either."""

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Of batch norm the schema does not say that it changes its statistics.
        if func._schema.is_mutable or "batch_norm" in str(func):
            self.changed += [(t, t.clone()) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, pytree.tree_leaves(results)))
        return results


class Tape:
    """Records on any device. `recordings`: how many; `replays`: of all of them."""

    def __init__(self) -> None:
        self.recordings = self.replays = self.rehearsals = 0

    def rehearse(self, part: Callable[[], None]) -> None:
        """Refuses what would wait for a GPU."""
        drawn = torch.get_rng_state()
        self.rehearsals += 1
        try:
            with _Waits():
                part()
        finally:
            torch.set_rng_state(drawn)

    def record(self, part: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Leaves all as it was but for the results, which hold nothing yet."""
        drawn, tape = torch.get_rng_state(), _Written()
        try:
            with tape:
                results = part()
        finally:
            torch.set_rng_state(drawn)
        # Past autograd, to which nothing has happened.
        for tensor, before in reversed(tape.changed):
            tensor.data.copy_(before)
        for result in pytree.tree_leaves(results):
            if isinstance(result, Tensor) and result.is_floating_point():
                result.data.fill_(torch.nan)
        self.recordings += 1
        return results, lambda: self._replay(tape)

    def _replay(self, tape: _Written) -> None:
        self.replays += 1
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, old in tape.operations:
                for kept, new in zip(old, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(kept, Tensor) and kept.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        kept.copy_(new)
