"""CUDA graphs as what records a training step (`recording.py`)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")


class CudaGraphs:
    """Records on a stream of its own into one pool of memory.

    Graphs of one pool may write over what others have left: results that are kept alive are safe, and what a backward
    pass reads of its forward pass is, as long as no other step comes between the two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, part: Callable[[], None]) -> None:
        """On the recorder's stream, where libraries set up what they need for it; RuntimeError where the host would
        wait: that would spoil a capture beyond repair, and here spoils nothing."""
        drawn, current = torch.cuda.get_rng_state(self.device), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
                part()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self.stream)
            torch.cuda.set_rng_state(drawn, self.device)

    def record(self, part: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """One graph. Other threads, which may copy rows meanwhile, are left alone."""
        gc.collect()  # no graph that was given up may be destroyed while another is captured
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index]
        drawn = generator.get_state()
        try:
            with torch.cuda.graph(graph, stream=self.stream, pool=self.pool, capture_error_mode="thread_local"):
                results = part()
        except RuntimeError:
            self._recover(current, generator, drawn)
            raise
        return results, graph.replay

    def _recover(self, current: torch.cuda.Stream, generator: torch.Generator, drawn: torch.Tensor) -> None:
        """Ending a capture that failed stops halfway: its stream is still the current one, memory still comes from its
        pool, and the generator counts draws for a graph that there is not."""
        torch.cuda.set_stream(current)
        with suppress(RuntimeError, AttributeError):  # it had come so far, or torch has no such function
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        fresh = torch.Generator(self.device)
        fresh.set_state(drawn)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
