"""One operation for the memories that are written by a delta rule: linear attention, DeltaNet, Titans, Hope."""

from clplat.kernels.delta_memory.interface import delta_memory, which_backend
from clplat.kernels.delta_memory.reference import MemoryState, Mode

__all__ = ["MemoryState", "Mode", "delta_memory", "which_backend"]
