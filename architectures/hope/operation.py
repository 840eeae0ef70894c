"""`kernels.self_modifying` for the memories that it knows, with the memory's own arguments and states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.state import LOWEST_GATE, MemoryState
from clplat.architectures.hope.inputs import HeadInputs
from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.kernels import self_modifying as kernel


def operation_for(options: SelfModifyingOptions) -> SelfModifyingOperation | None:
    """What computes such memories; None where only the chunked form here does."""
    network, wanted = options.network, ("key", "value", "rate", "decay")[: 3 + options.decay]
    matrix = network.kind == "mlp" and network.depth == 1 and not network.residual
    usual = options.generators == wanted and options.bias.kind == "l2"
    if not matrix or not usual or options.read != "before" or len(options.groups) > 1:
        return None
    return SelfModifyingOperation(options)


@dataclass(frozen=True)
class SelfModifyingOperation:
    """Matrices that all share a chunk and are read before each write."""

    options: SelfModifyingOptions
    name: ClassVar[str] = "self_modifying"

    def form(self, inputs: HeadInputs) -> str:
        """The form in which it takes such tokens: `torch` or `triton`."""
        assert inputs.query is not None
        x, q = (part.transpose(1, 2) for part in (inputs.x, inputs.query))
        return kernel.which_backend(x, q, chunk=self.options.chunk)

    def __call__(
        self, inputs: HeadInputs, readouts: dict[str, Tensor], biases: dict[str, Tensor], state: MemoryState, *,
        fresh: bool, cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:  # fmt: skip
        """Answers (B, H, T, D) and the state behind; a `fresh` state has no open chunk."""
        options, heads = self.options, inputs.x.shape[1]
        rule = kernel.Rule(
            delta=options.delta, max_rate=options.largest_rate, max_gradient=options.max_gradient,
            unit_values=options.unit_values, self_targets=options.target == "self",
        )  # fmt: skip
        names = ("rate", "decay")[: len(readouts)]
        gates = [part[name].squeeze(1) for name in names for part in (readouts, biases)]
        W, S, anchor = (
            layers[0].unflatten(1, (-1, heads)) if layers else None
            for layers in (state.weights, state.momentum, () if fresh else state.anchor)
        )
        assert W is not None
        o, end = kernel.self_modifying(
            self._tokens(inputs), kernel.Readouts(*gates), rule=rule, chunk=options.chunk, cu_seqlens=cu_seqlens,
            state=kernel.SelfModifyingState(W, S, anchor, None if fresh else state.offset.int()),
        )  # fmt: skip
        last = end.W if end.anchor is None else end.anchor
        offset = torch.zeros_like(state.offset) if end.offset is None else end.offset.long()
        kept = [() if part is None else (part.flatten(1, 2),) for part in (end.W, end.S, last)]
        return o.transpose(1, 2), MemoryState(kept[0], kept[1], kept[2], offset)

    def _tokens(self, inputs: HeadInputs) -> kernel.Inputs:
        """Tokens before heads; queries of unit length, gates squashed."""
        assert inputs.query is not None
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        q = F.normalize(inputs.query.to(wide), dim=-1).to(inputs.query.dtype)
        momentum = damping = None
        if inputs.momentum is not None:
            momentum = F.logsigmoid(inputs.momentum.transpose(1, 2))
            damping = -momentum.expm1() if self.options.damped else None
            momentum = momentum.clamp(min=LOWEST_GATE)
        return kernel.Inputs(inputs.x.transpose(1, 2), q.transpose(1, 2), momentum, damping)
