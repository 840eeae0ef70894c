"""The Triton kernels as two PyTorch operators, with shapes for the compiler, autograd, autocast and FLOP counts.

`clplat::mlp_memory_forward` and `clplat::mlp_memory_backward` take only tensors and numbers, so that torch.compile and
CUDA graphs see one opaque step each. A memory goes through them as one row of numbers (`layout.packed_row`). What an
operator does not return is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from clplat.kernels.delta_memory.op import num_slots
from clplat.kernels.delta_memory.reference import Inputs
from clplat.kernels.mlp_memory.layout import Layout, chunks_per_group, may_end_inside, packed_row, unpacked
from clplat.kernels.mlp_memory.reference import ACTIVATIONS, BIASES, MLPState, Rule


def fused(
    inputs: Inputs, *, rule: Rule, chunk: int, state: MLPState, cu_seqlens: Tensor | None
) -> tuple[Tensor, MLPState]:
    """`mlp_memory` by the kernels; arguments are checked already."""
    if not torch.compiler.is_compiling() and any(_has_tangent(part) for part in (*inputs, *state)):
        raise ValueError("backend: the kernels know no forward-mode derivatives; ask for backend='torch'")
    inputs = Inputs(*inputs[:3], *(None if gate is None else gate.to(state.W1.dtype) for gate in inputs[3:]))
    keep = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (*inputs, *state))
    kind = (ACTIVATIONS.index(rule.activation), BIASES.index(rule.bias), rule.residual)
    o, rows, _ = torch.ops.clplat.mlp_memory_forward(
        *inputs, packed_row(state), state.offset, cu_seqlens, *kind, chunk, keep
    )
    momentum, length = inputs.log_momentum is not None, inputs.v.shape[1]
    end = unpacked(rows, inputs.q.shape[3], inputs.v.shape[3], momentum=momentum)
    if not may_end_inside(length, chunk, packed=cu_seqlens is not None, offsets=state.offset is not None):
        return o, end
    offset = _written(inputs, state, cu_seqlens, chunk)
    closed = (offset == 0)[:, None, None, None]
    assert end.anchor is not None
    first, second = (torch.where(closed, W, anchor) for W, anchor in zip(end.weights, end.anchor, strict=True))
    return o, end._replace(anchor1=first, anchor2=second, offset=offset)


def _has_tangent(part: Tensor | None) -> bool:
    return part is not None and torch.autograd.forward_ad.unpack_dual(part).tangent is not None


def _written(inputs: Inputs, state: MLPState, cu_seqlens: Tensor | None, chunk: int) -> Tensor:
    """Tokens in every sequence's open chunk."""
    if cu_seqlens is None:
        lengths = torch.full((len(state.W1),), inputs.v.shape[1], dtype=torch.int32, device=state.W1.device)
    else:
        lengths = cu_seqlens.diff().to(torch.int32)
    return (lengths if state.offset is None else lengths + state.offset) % chunk


def _parts(tensors: tuple[Tensor | None, ...]) -> tuple[Inputs, Tensor, Tensor | None, Tensor | None]:
    q, k, v = (part if part is None or part.stride(-1) == 1 else part.contiguous() for part in tensors[:3])
    rest = (None if part is None else part.contiguous() for part in tensors[3:])
    rate, decay, momentum, states, offset, cu_seqlens = rest
    assert q is not None and k is not None and v is not None and rate is not None and states is not None
    return Inputs(q, k, v, rate, decay, momentum), states, offset, cu_seqlens


@torch.library.custom_op("clplat::mlp_memory_forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, activation: int, bias: int, residual: bool,
    chunk: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the end state's row, and the memories before all groups of chunks, which the backward pass needs."""
    from clplat.kernels.mlp_memory.launch import forward

    inputs, rows, begun, cu = _parts((q, k, v, rate, log_decay, log_momentum, states, offset, cu_seqlens))
    layout = Layout.of(inputs, rows, begun, cu, _rule(activation, bias, residual), chunk)
    o, end, starts = forward(inputs, rows, begun, cu, layout, keep=keep)
    return o, end, v.new_empty(0) if starts is None else starts


def _rule(activation: int, bias: int, residual: bool) -> Rule:
    return Rule(activation=ACTIVATIONS[activation], bias=BIASES[bias], residual=residual)  # type: ignore[arg-type]


@forward_op.register_fake
def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, activation: int, bias: int, residual: bool,
    chunk: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    where = {"packed": cu_seqlens is not None, "offsets": offset is not None}
    N, heads, _, size = states.shape
    pairs = 1 + (log_momentum is not None) + may_end_inside(v.shape[1], chunk, **where)
    groups = num_slots(N, v.shape[1], chunk * chunks_per_group(chunk), **where)
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        states.new_empty(N, heads, pairs, size),
        states.new_empty(groups, heads, pairs, size) if keep else v.new_empty(0),
    )


@torch.library.custom_op("clplat::mlp_memory_backward", mutates_args=())
def backward_op(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor, do: Tensor, dend: Tensor | None,
    activation: int, bias: int, residual: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Adjoints of q, k, v, rate, log_decay, log_momentum and the state's row; `dend` None means zero."""
    from clplat.kernels.mlp_memory.launch import backward

    inputs, rows, begun, cu = _parts((q, k, v, rate, log_decay, log_momentum, states, offset, cu_seqlens))
    layout = Layout.of(inputs, rows, begun, cu, _rule(activation, bias, residual), chunk)
    end = None if dend is None else dend.contiguous()
    found = backward(inputs, rows, begun, cu, starts, do.contiguous(), end, layout)
    return tuple(v.new_empty(0) if part is None else part for part in found)  # type: ignore[return-value]


@backward_op.register_fake
def _backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    states: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        v.new_empty(0) if part is None else torch.empty(part.shape, dtype=part.dtype, device=part.device)
        for part in (q, k, v, rate, log_decay, log_momentum, states)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.bias, ctx.residual, ctx.chunk, keep = inputs
    if not keep:
        raise RuntimeError("mlp_memory_forward was called with keep=False for tensors that need gradients")
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    # Else zeros as large as all kept memories would be made, for nothing.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dend: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do
    kind = (ctx.activation, ctx.bias, ctx.residual, ctx.chunk)
    found = torch.ops.clplat.mlp_memory_backward(*saved, do, dend, *kind)
    gradients = [None if part is None else gradient for part, gradient in zip(saved[:7], found, strict=True)]
    return (*gradients, None, None, None, None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_setup)


def flops(tokens: int, heads: int, D: int, E: int, inner: int, chunk: int, *, dot: bool, momentum: bool) -> int:
    """Multiplications and additions of the chunked form's matrix products, forward."""
    # For each number of a layer: ask it with the key, write it, read it; with momentum write and read that as well.
    # The key's answer is not asked for by `dot`; the second layer sends errors back.
    first = 3 + 2 * momentum
    one_chunk = 2 * chunk * inner * (D * first + E * (first + 1 - dot))
    # Queries meet keys in both layers, the slopes are summed.
    one_chunk += 2 * chunk**2 * (D + 2 * inner + E) + 2 * chunk**3 * momentum
    return round(tokens / chunk * heads * one_chunk)


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.clplat.mlp_memory_forward)
def _forward_flops(q: Shape, k: Shape, v: Shape, rate: Shape, decay: Any, momentum: Any, *rest: Any, **_: Any) -> int:
    states, (_activation, bias, _residual, chunk, _keep) = rest[0], rest[-5:]
    return _counted(q, v, momentum, states, bias, chunk)


@register_flop_formula(torch.ops.clplat.mlp_memory_backward)
def _backward_flops(q: Shape, k: Shape, v: Shape, rate: Shape, decay: Any, momentum: Any, *rest: Any, **_: Any) -> int:
    states, (_activation, bias, _residual, chunk) = rest[0], rest[-4:]
    return 2 * _counted(q, v, momentum, states, bias, chunk)


def _counted(q: Shape, v: Shape, momentum: Any, states: Shape, bias: int, chunk: int) -> int:
    D, E = q[3], v[3]
    dot, inner = BIASES[bias] == "dot", states[3] // (D + E)
    return flops(v[0] * v[1], v[2], D, E, inner, chunk, dot=dot, momentum=momentum is not None)
