"""The processes that train one run together, as a strategy sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

PART = 2**25
"""Bytes that all processes bring together at a time: large enough for a network's full speed, small beside a device."""


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

    def deal(self, fields: Mapping[str, Tensor], rows: Tensor, takers: Tensor) -> dict[str, Tensor]:
        """Those of the rows numbered `rows` (M,) that `takers` (M,) has for this process, in their order.

        Row n lies with process n mod size, there in place n // size, as `gather` counts them. Both tensors lie on the
        CPU and are equal on all processes, so that each knows what it is sent, and no device is waited for. What
        travels is bytes: every value of every type arrives bit for bit. Nothing does where all rows stay.
        """
        if self.size == 1:
            return rows_at(fields, rows)
        givers = rows % self.size
        given, taken = givers == self.rank, takers == self.rank
        if torch.equal(givers, takers):
            return rows_at(fields, rows[taken] // self.size)
        # Sent ordered by process, and by their own order within it; so they arrive, and are put back into order.
        sent = packed(rows_at(fields, (rows[given] // self.size)[takers[given].argsort(stable=True)]))
        received = sent.new_empty(int(taken.sum()), sent.shape[1])
        dist.all_to_all_single(received, sent, self._counted(givers[taken]), self._counted(takers[given]))
        arrived = givers[taken].argsort(stable=True).argsort()
        return unpacked(received[arrived.to(received.device, non_blocking=True)], fields)

    def together(
        self, fields: Mapping[str, Tensor], start: int, stop: int, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The rows numbered `start` to `stop` − 1, which lie as in `deal`, on every process; all must ask for the same.

        They come on `device`, or where they lie; of one process as a view where that is so. Several bring them together
        in parts, so that a device from which they go to the host never has them all.
        """
        if self.size == 1:
            return {name: tensor[start:stop].to(device or tensor.device) for name, tensor in fields.items()}
        found = {n: t.new_empty(stop - start, *t.shape[1:], device=device or t.device) for n, t in fields.items()}
        step = max(1, PART // (self.size * max(1, sum(row_bytes(tensor) for tensor in fields.values()))))
        end = -(-stop // self.size)
        for first in range(start // self.size, end, step):
            last = min(first + step, end)
            own = {name: _filled(tensor[first:last], last - first) for name, tensor in fields.items()}
            low, high = max(start, first * self.size), min(stop, last * self.size)
            for name, tensor in unpacked(self.gather(packed(own)), own).items():
                found[name][low - start : high - start] = tensor[low - first * self.size : high - first * self.size]
        return found

    def _counted(self, processes: Tensor) -> list[int]:
        return processes.bincount(minlength=self.size).tolist()  # type: ignore[no-any-return]

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


def rows_at(fields: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    """Rows of some fields, by places on the CPU."""
    # Not blocking: waiting for the device to have the places would stall a step.
    index = {device: places.to(device, non_blocking=True) for device in {t.device for t in fields.values()}}
    return {name: tensor[index[tensor.device]] for name, tensor in fields.items()}


def packed(fields: Mapping[str, Tensor]) -> Tensor:
    """The bytes of B rows of some fields, side by side, (B, bytes a row)."""
    rows = [tensor.reshape(len(tensor), math.prod(tensor.shape[1:])) for tensor in fields.values()]
    # Strided anew: of a single column `contiguous` leaves any stride as it is, and bytes need one of 1.
    return torch.cat([p.contiguous().as_strided(p.shape, (p.shape[1], 1)).view(torch.uint8) for p in rows], 1)


def unpacked(rows: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`, with the names, types and shapes of the rows of `like`."""
    widths = [row_bytes(tensor) for tensor in like.values()]
    found = {}
    for (name, tensor), part in zip(like.items(), rows.split(widths, 1), strict=True):
        # A copy of its own, also of one row: what begins in the middle of a row cannot be read as another type.
        own = part.clone(memory_format=torch.contiguous_format).view(-1)
        found[name] = own.view(tensor.dtype).view(len(rows), *tensor.shape[1:])
    return found


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one row of a tensor, which may have none."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _filled(rows: Tensor, count: int) -> Tensor:
    """`count` rows, of which the last may be missing: processes before this one have one more."""
    return rows if len(rows) == count else torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
