"""The processes that train one run together, as a strategy sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and size of the process group; every method is free when there is one process."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The initialised process group, or one process."""
        if dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), size=dist.get_world_size())
        return cls()

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all processes in the order in which the loader dealt them out; all must bring the same shape.

        Row i of process r was row i·size + r, so the result is what one process alone would have had.
        """
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of the process `source`, in place."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Elementwise mean over processes, as a new tensor; of what is no floating-point number the first one's."""
        if self.size == 1:
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            return self.sum(tensor.clone()).div_(self.size)
        return self.broadcast(tensor.clone())

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the tensors of the first, in place."""
        for tensor in tensors if self.size > 1 else ():
            self.broadcast(tensor)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()
