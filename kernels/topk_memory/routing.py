"""In which order tokens meet their experts: a stable sort by expert whose ragged lengths stay on the device.

`expert_order` replaces a sort, a count and the host's wait for it in a mixture of experts that drops no token:

    order, places, ends = expert_order(chosen, experts)        # chosen (tokens, k), experts of each token
    rows = x[order // k]                                       # tokens · k rows, those of expert 0 first
    rows = F.grouped_mm(rows, weights, offs=ends)              # (tokens · k, out)
    y = (rows[places].unflatten(0, chosen.shape) * gates[..., None]).sum(1)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clplat.kernels.backends import chosen_form, device_obstacle
from clplat.kernels.topk_memory.interface import Backend

LARGEST_EXPERTS = 1024
BLOCK, COMPARED = 128, 32
"""Entries of a program, and how many of them it compares with all others at a time."""


class ExpertOrder(NamedTuple):
    """The sort and its lengths, all int32 on the device of the indices."""

    order: Tensor
    """(entries,), which entry of the flattened indices lies in each place: experts in turn, entries of one in order."""
    places: Tensor
    """(entries,), in which place each entry lies: the inverse of `order`."""
    ends: Tensor
    """(experts,), where the places of each expert end, as `torch.nn.functional.grouped_mm` wants its `offs`."""


def expert_order(indices: Tensor, num_experts: int, *, backend: Backend = "auto") -> ExpertOrder:
    """Sorts entries by expert, stably; nothing is read back to the host, and every run gives the same.

    `indices` of any shape, int32 or int64. An entry below 0 or not below `num_experts` has no expert (a token that is
    padding): it comes last, behind `ends[-1]`. `backend`: `auto` counts (two kernels) on GPUs and up to 1,024 experts
    and is `torch.sort` elsewhere and under `torch.func`, which does not see into kernels; `triton` never falls back;
    `torch` and `reference` are both `torch.sort`.
    Raises ValueError for other types and backends.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"indices: must be a tensor of int32 or int64, got {kind}")
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts: must be a whole number, at least 1, got {num_experts!r}")
    form = chosen_form(backend, "reference", lambda: _obstacle(indices, num_experts), on_gpu=indices.is_cuda)
    if indices.numel() and form == "triton":
        return ExpertOrder(*torch.ops.clplat.expert_order(indices.flatten(), num_experts))
    return sorted_by_expert(indices.flatten(), num_experts)


def sorted_by_expert(indices: Tensor, num_experts: int) -> ExpertOrder:
    """The definition: `torch.sort`."""
    none = (indices < 0) | (indices >= num_experts)
    experts, order = indices.masked_fill(none, num_experts).sort(stable=True)
    counts = order.new_zeros(num_experts + 1).scatter_add(0, experts.long(), torch.ones_like(order))
    ends = counts[:-1].cumsum(0)
    return ExpertOrder(order.to(torch.int32), order.argsort().to(torch.int32), ends.to(torch.int32))


def _obstacle(indices: Tensor, num_experts: int) -> str:
    """Why the kernels cannot sort these; empty where they can."""
    if found := device_obstacle(indices, "indices"):
        return found
    if num_experts > LARGEST_EXPERTS:
        return f"there are {num_experts} experts; the kernels go up to {LARGEST_EXPERTS}"
    return ""


def counted(indices: Tensor, num_experts: int) -> ExpertOrder:
    """The sort of flat indices by the kernels."""
    from clplat.kernels.topk_memory.triton_routing import count, place

    num = len(indices)
    blocks = -(-num // BLOCK)
    counts = torch.zeros(num_experts + 1, blocks, dtype=torch.int32, device=indices.device)
    order, places = (torch.empty(num, dtype=torch.int32, device=indices.device) for _ in range(2))
    sizes = (num, num_experts, blocks)
    count[(blocks,)](indices, counts, *sizes, B=BLOCK, J=COMPARED)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    place[(blocks,)](indices, counts, ends, order, places, *sizes, B=BLOCK, J=COMPARED)
    return ExpertOrder(order, places, ends[:-1, -1].clone())


@torch.library.custom_op("clplat::expert_order", mutates_args=())
def order_op(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`counted` as one step for the compiler and for graphs."""
    return tuple(counted(indices.contiguous(), num_experts))  # type: ignore[return-value]


@order_op.register_fake
def _order_shapes(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, places = (indices.new_empty(len(indices), dtype=torch.int32) for _ in range(2))
    return order, places, indices.new_empty(num_experts, dtype=torch.int32)
