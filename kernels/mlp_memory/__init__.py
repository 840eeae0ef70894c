"""One operation for memories that are a network of two layers, trained while they read: Titans' LMM, TTT-MLP."""

from clplat.kernels.mlp_memory.interface import mlp_memory, which_backend
from clplat.kernels.mlp_memory.reference import MLPState, Rule

__all__ = ["MLPState", "Rule", "mlp_memory", "which_backend"]
