"""One operation for matrix memories that make their own keys, values and gates while they read: Hope's first half."""

from clplat.kernels.self_modifying.interface import self_modifying, which_backend
from clplat.kernels.self_modifying.reference import Inputs, Readouts, Rule, SelfModifyingState

__all__ = ["Inputs", "Readouts", "Rule", "SelfModifyingState", "self_modifying", "which_backend"]
