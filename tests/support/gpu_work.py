"""Work on a GPU for which the host may not wait, and work that is captured to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Found = TypeVar("Found")


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the GPU raises inside; what ran before is waited for first."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(compute: Callable[[], Found]) -> tuple[torch.cuda.CUDAGraph, Found]:
    """A graph of what `compute` does, and the tensors into which each replay writes; called once before, to compile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    return graph, found
