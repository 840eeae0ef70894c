"""The operations of `clplat.kernels` that compute a rule, with the memory's own arguments and states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import LOWEST_GATE, MemoryState, Tokens
from clplat.kernels import delta_memory as matrix
from clplat.kernels import mlp_memory as mlp


class Operation(Protocol):
    """One of them, for one rule."""

    name: ClassVar[str]

    def form(self, tokens: Tokens) -> str:
        """The form in which it takes such tokens: `torch` or `triton`."""

    def __call__(
        self, named: dict[str, Tensor], state: MemoryState, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Answers (B, T, H, E) and the state behind; a `state` without anchor begins a chunk."""


def operation_for(rule: MemoryRule) -> Operation | None:
    """What computes a rule; None where only the chunked form here does."""
    memory = rule.memory
    if memory.norm or memory.kind != "mlp" or rule.target != "value" or rule.bias.kind not in ("dot", "l2"):
        return None
    if rule.retention == "channel" or rule.mapped or rule.read != "post" or rule.max_gradient is not None:
        return None
    if rule.window > 1 or rule.orthogonal:
        return None
    # Erasing is the gated delta rule where keys have unit length and gradients know no memory.
    if rule.delta != "none" and not (rule.hebbian and rule.feature == "unit" and rule.optimizer == "gd"):
        return None
    if memory.depth == 1 and not memory.residual:
        return MatrixOperation(rule)
    return MLPOperation(rule) if memory.depth == 2 else None


def by_name(tokens: Tokens) -> dict[str, Tensor]:
    """The arguments of an operation that go with tokens, tokens before heads."""
    parts = {"q": tokens.q, "k": tokens.k, "v": tokens.v, "rate": tokens.rate, "log_momentum": tokens.log_momentum}
    parts["log_decay"] = tokens.log_decay[0].squeeze(-1) if tokens.log_decay else None
    return {name: part.transpose(1, 2) for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class MatrixOperation:
    """`delta_memory`."""

    rule: MemoryRule
    name: ClassVar[str] = "delta_memory"

    def form(self, tokens: Tokens) -> str:
        """See `Operation`."""
        return matrix.which_backend(*(part.transpose(1, 2) for part in tokens[:3]), chunk=self.rule.chunk)

    def __call__(
        self, named: dict[str, Tensor], state: MemoryState, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """See `Operation`."""
        anchor, offset = (state.anchor[0], state.offset.int()) if state.anchor else (None, None)
        given = matrix.MemoryState(state.weights[0], state.momentum[0] if state.momentum else None, anchor, offset)
        modes: dict[str, matrix.Mode] = {"chunk": "frozen", "token": "exact", "decayed": "gdn"}
        mode = "hebb" if self.rule.hebbian else modes[self.rule.gradient_at]
        if self.rule.delta != "none":
            mode, named = "gdn", _undecayed(named)
        o, end = matrix.delta_memory(**named, mode=mode, chunk=self.rule.chunk, state=given, cu_seqlens=cu_seqlens)
        momentum = () if end.S is None else (end.S,)
        if not self.rule.anchored:
            return o, MemoryState((end.W,), momentum, (), state.offset)
        anchor = end.W if end.anchor is None else end.anchor
        return o, MemoryState((end.W,), momentum, (anchor,), _offset(end.offset, state))


def _undecayed(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """a W − η k kᵀ W + η k vᵀ as a (I − β k kᵀ) W + β k wᵀ, with β = η / a and w = a v."""
    if "log_decay" not in named:
        return named
    log_decay = named["log_decay"].clamp(min=LOWEST_GATE)
    v = (named["v"] * log_decay.exp().unsqueeze(-1)).to(named["v"].dtype)
    return named | {"v": v, "rate": named["rate"] * torch.exp(-log_decay)}


@dataclass(frozen=True)
class MLPOperation:
    """`mlp_memory`."""

    rule: MemoryRule
    name: ClassVar[str] = "mlp_memory"

    def form(self, tokens: Tokens) -> str:
        """See `Operation`."""
        inner = self.rule.widths(tokens.k.shape[-1], tokens.v.shape[-1])[0][1]
        return mlp.which_backend(*(part.transpose(1, 2) for part in tokens[:3]), inner=inner, chunk=self.rule.chunk)

    def __call__(
        self, named: dict[str, Tensor], state: MemoryState, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """See `Operation`."""
        memory, nothing = self.rule.memory, (None, None)
        (W1, W2), (S1, S2), (first, second) = state.weights, state.momentum or nothing, state.anchor or nothing
        given = mlp.MLPState(W1, W2, S1, S2, first, second, state.offset.int() if state.anchor else None)
        bias: Literal["dot", "l2"] = "dot" if self.rule.bias.kind == "dot" else "l2"
        o, end = mlp.mlp_memory(
            **named, state=given, activation=memory.activation, bias=bias, residual=memory.residual,
            chunk=self.rule.chunk, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o, MemoryState(end.weights, end.momentum or (), end.anchor or end.weights, _offset(end.offset, state))


def _offset(end: Tensor | None, before: MemoryState) -> Tensor:
    return before.offset.new_zeros(before.offset.shape) if end is None else end.long()
