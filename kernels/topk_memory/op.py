"""The Triton kernels as two PyTorch operators, with shapes for the compiler, autograd and FLOP counts.

`clplat::topk_read_forward` and `clplat::topk_read_backward` take only tensors and numbers, so that torch.compile and
CUDA graphs see one opaque step each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from clplat.kernels.topk_memory.reference import TopkRead


def fused(
    q: Tensor, keys: Tensor, values: Tensor, k: int, temperature: float, count: Tensor | None, mask: Tensor | None
) -> TopkRead:
    """`topk_read` of q (N, D) by the kernels; arguments are checked already."""
    if not torch.compiler.is_compiling() and any(_has_tangent(part) for part in (q, keys, values)):
        raise ValueError("backend: the kernels know no forward-mode derivatives; ask for backend='torch'")
    return TopkRead(*torch.ops.clplat.topk_read_forward(q, keys, values, count, mask, k, 1 / temperature))


def _has_tangent(part: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(part).tangent is not None


def _dense(*parts: Tensor) -> list[Tensor]:
    """With features side by side, as the kernels read them."""
    return [part if part.stride(-1) == 1 else part.contiguous() for part in parts]


@torch.library.custom_op("clplat::topk_read_forward", mutates_args=())
def forward_op(
    q: Tensor, keys: Tensor, values: Tensor, count: Tensor | None, mask: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, indices, weights and mass; `scale` is 1 / τ."""
    from clplat.kernels.topk_memory.launch import forward

    q, keys, values = _dense(q, keys, values)
    return forward(q, keys, values, count, None if mask is None else mask.contiguous(), k, scale)


@forward_op.register_fake
def _forward_shapes(
    q: Tensor, keys: Tensor, values: Tensor, count: Tensor | None, mask: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, full = len(q), torch.float32
    chosen = q.new_empty(N, k, dtype=torch.int64)
    output = values.new_empty(N, values.shape[1])
    return output, chosen, q.new_empty(N, k, dtype=full), q.new_empty(len(keys), dtype=full)


@torch.library.custom_op("clplat::topk_read_backward", mutates_args=())
def backward_op(
    q: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor, doutput: Tensor,
    dweights: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adjoints of q, keys and values; of the weights', None means zero."""
    from clplat.kernels.topk_memory.launch import backward

    dweights = None if dweights is None else dweights.contiguous()
    q, keys, values = _dense(q, keys, values)
    return backward(q, keys, values, indices, weights, doutput.contiguous(), dweights, scale)


@backward_op.register_fake
def _backward_shapes(q: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dkeys, dvalues = (part.new_empty(part.shape) for part in (q, keys, values))
    return dq, dkeys, dvalues


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, keys, values, *_, ctx.scale = inputs
    ctx.save_for_backward(q, keys, values, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, doutput: Tensor | None, _: Any, dweights: Tensor | None, __: Any) -> tuple[Tensor | None, ...]:
    q, keys, values, indices, weights = ctx.saved_tensors
    if doutput is None:
        doutput = values.new_zeros(len(q), values.shape[1])
    found = torch.ops.clplat.topk_read_backward(q, keys, values, indices, weights, doutput, dweights, ctx.scale)
    return (*found, None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_setup)

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.clplat.topk_read_forward)
def _forward_flops(q: Shape, keys: Shape, values: Shape, count: Any, mask: Any, k: int, *_: Any, **__: Any) -> int:
    """All scores, and the chosen values' sum; what is scored again is no part of the operation."""
    return 2 * q[0] * (keys[0] * q[1] + k * values[1])


@register_flop_formula(torch.ops.clplat.topk_read_backward)
def _backward_flops(q: Shape, keys: Shape, values: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    """Two products of the chosen slots for each of the forward pass's."""
    return 4 * q[0] * indices[1] * (q[1] + values[1])
