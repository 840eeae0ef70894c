"""Exact top-k reads of a memory of slots, and the order in which tokens meet their experts."""

from clplat.kernels.topk_memory.interface import topk_read, which_backend
from clplat.kernels.topk_memory.reference import TopkRead
from clplat.kernels.topk_memory.routing import ExpertOrder, expert_order

__all__ = ["ExpertOrder", "TopkRead", "expert_order", "topk_read", "which_backend"]
