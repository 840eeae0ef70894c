"""What the mixing layers of a `MemoryTransformer` are told of the tokens beside their activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from clplat.architectures.associative_memory.layout import Documents


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Of B rows of T tokens, with S tokens in an attention layer's cache; each layer takes what it needs."""

    positions: Tensor
    """(T,), or (B, T) where rows continue at places of their own."""
    mask: Tensor | None
    """For attention, (B, 1, T, S + T) bool; None is the plain causal one."""
    documents: Documents | None
    """Of packed rows; None where each row is one text."""
    lengths: Tensor
    """(B,) tokens of each row that came before, all 0 in a full pass."""


@runtime_checkable
class StartsOfItself(Protocol):
    """A part of a layer with weights that are not drawn like a projection's."""

    def reset_dynamics(self) -> None:
        """Draw them; called once the model has drawn all others."""
        ...
