"""The Triton kernels as two PyTorch operators, with shapes for the compiler, autograd, autocast and FLOP counts.

`clplat::delta_memory_forward` and `clplat::delta_memory_backward` take only tensors and numbers, so that torch.compile
and CUDA graphs see one opaque step each. What an operator does not return is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from clplat.kernels.delta_memory.reference import MODES, Inputs, MemoryState, Mode


def fused(
    inputs: Inputs, *, mode: Mode, chunk: int, state: MemoryState, cu_seqlens: Tensor | None
) -> tuple[Tensor, MemoryState]:
    """`delta_memory` by the kernels; arguments are checked already."""
    if not torch.compiler.is_compiling() and any(_has_tangent(part) for part in (*inputs, *state)):
        raise ValueError("backend: the kernels know no forward-mode derivatives; ask for backend='torch'")
    inputs = Inputs(*inputs[:3], *(None if gate is None else gate.to(state.W.dtype) for gate in inputs[3:]))
    keep = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (*inputs, *state))
    o, W, S, anchor, *_ = torch.ops.clplat.delta_memory_forward(
        *inputs, state.W, state.S, state.anchor, state.offset, cu_seqlens, MODES.index(mode), chunk, keep
    )
    S = S if state.S is not None else None
    if mode != "frozen" or (cu_seqlens is None and state.offset is None and inputs.v.shape[1] % chunk == 0):
        return o, MemoryState(W, S)
    offset = _written(inputs, state, cu_seqlens, chunk)
    return o, MemoryState(W, S, torch.where((offset == 0)[:, None, None, None], W, anchor), offset)


def _has_tangent(part: Tensor | None) -> bool:
    return part is not None and torch.autograd.forward_ad.unpack_dual(part).tangent is not None


def _written(inputs: Inputs, state: MemoryState, cu_seqlens: Tensor | None, chunk: int) -> Tensor:
    """Tokens in every sequence's open chunk."""
    if cu_seqlens is None:
        lengths = torch.full((len(state.W),), inputs.v.shape[1], dtype=torch.int32, device=state.W.device)
    else:
        lengths = cu_seqlens.diff().to(torch.int32)
    return (lengths if state.offset is None else lengths + state.offset) % chunk


def _parts(tensors: tuple[Tensor | None, ...]) -> tuple[Inputs, MemoryState, Tensor | None]:
    q, k, v = (part if part is None or part.stride(-1) == 1 else part.contiguous() for part in tensors[:3])
    rest = (None if part is None else part.contiguous() for part in tensors[3:])
    rate, decay, momentum, W, S, anchor, offset, cu_seqlens = rest
    assert q is not None and k is not None and v is not None and rate is not None and W is not None
    return Inputs(q, k, v, rate, decay, momentum), MemoryState(W, S, anchor, offset), cu_seqlens


def num_slots(sequences: int, length: int, chunk: int, *, packed: bool, offsets: bool) -> int:
    """Places for chunks: of all sequences, whatever their lengths and offsets, which lie on the device."""
    if packed:
        return length // chunk + 2 * sequences
    return sequences * -(-(length + (chunk - 1 if offsets else 0)) // chunk)


@torch.library.custom_op("clplat::delta_memory_forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    W: Tensor, S: Tensor | None, anchor: Tensor | None, offset: Tensor | None, cu_seqlens: Tensor | None,
    mode: int, chunk: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the end state's W, S and anchor, and what the backward pass needs (`layout.Kept`)."""
    from clplat.kernels.delta_memory.launch import forward

    inputs, state, cu = _parts((q, k, v, rate, log_decay, log_momentum, W, S, anchor, offset, cu_seqlens))
    o, end, kept = forward(inputs, state, cu, mode=mode, chunk=chunk, keep=keep)
    return tuple(v.new_empty(0) if part is None else part for part in (o, end.W, end.S, end.anchor, *kept))  # type: ignore[return-value]


@forward_op.register_fake
def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    W: Tensor, S: Tensor | None, anchor: Tensor | None, offset: Tensor | None, cu_seqlens: Tensor | None,
    mode: int, chunk: int, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def maybe(wanted: bool, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if wanted else v.new_empty(0)

    momentum, slots = (
        log_momentum is not None,
        num_slots(len(W), v.shape[1], chunk, packed=cu_seqlens is not None, offsets=offset is not None),
    )
    states = v.new_empty(slots if keep else 0, v.shape[2], W.shape[3], W.shape[2])
    square = v.new_empty(slots if keep else 0, v.shape[2], chunk, chunk)
    vectors = W.new_empty(slots if keep else 0, v.shape[2], 7, chunk)
    ragged = cu_seqlens is not None or offset is not None or v.shape[1] % chunk != 0
    return (
        maybe(True, v), maybe(True, W), maybe(momentum, W), maybe(MODES[mode] == "frozen" and ragged, W),
        maybe(keep, states), maybe(keep and momentum, states), maybe(keep and MODES[mode] != "hebb", v),
        maybe(keep, square), maybe(keep and MODES[mode] in ("exact", "gdn"), square), maybe(keep, vectors),
    )  # fmt: skip


@torch.library.custom_op("clplat::delta_memory_backward", mutates_args=())
def backward_op(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    W: Tensor, S: Tensor | None, anchor: Tensor | None, offset: Tensor | None, cu_seqlens: Tensor | None,
    W_kept: Tensor, S_kept: Tensor, errors: Tensor, P: Tensor, T: Tensor, vectors: Tensor,
    do: Tensor, dW: Tensor | None, dS: Tensor | None, danchor: Tensor | None, mode: int, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Adjoints of q, k, v, rate, log_decay, log_momentum, W, S and anchor; of an end state's part, None means zero."""
    from clplat.kernels.delta_memory.launch import EndAdjoints, backward
    from clplat.kernels.delta_memory.layout import Kept

    inputs, state, cu = _parts((q, k, v, rate, log_decay, log_momentum, W, S, anchor, offset, cu_seqlens))
    corrected = MODES[mode] in ("exact", "gdn")
    kept = Kept(
        W_kept, S_kept if S is not None else None, errors if mode else None, P, T if corrected else None, vectors
    )
    ends = (None if part is None or not part.numel() else part.contiguous() for part in (dW, dS, danchor))
    found = backward(inputs, state, cu, kept, do.contiguous(), EndAdjoints(*ends), mode=mode, chunk=chunk)
    return tuple(v.new_empty(0) if part is None else part for part in found)  # type: ignore[return-value]


@backward_op.register_fake
def _backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    W: Tensor, S: Tensor | None, anchor: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        v.new_empty(0) if part is None else torch.empty(part.shape, dtype=part.dtype, device=part.device)
        for part in (q, k, v, rate, log_decay, log_momentum, W, S, anchor)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.mode, ctx.chunk, keep = inputs
    if not keep:
        raise RuntimeError("delta_memory_forward was called with keep=False for tensors that need gradients")
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.mark_non_differentiable(*output[4:])
    # Else zeros as large as all kept states would be made, for nothing.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do
    found = torch.ops.clplat.delta_memory_backward(*saved, do, *rest[:3], ctx.mode, ctx.chunk)
    gradients = [None if part is None else gradient for part, gradient in zip(saved[:9], found, strict=True)]
    return (*gradients, None, None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_setup)


def flops(
    tokens: int, value_heads: int, D: int, E: int, chunk: int, *, mode: str, momentum: bool, passes: float = 1.0
) -> int:
    """Multiplications and additions of the forward pass's matrix products; the backward pass has 2.5 times as many."""
    corrected = mode in ("exact", "gdn")
    with_state = {"hebb": 2, "frozen": 3, "exact": 3, "gdn": 3}[mode] + momentum * (2 + corrected)
    one_chunk = 2 * chunk * D * E * with_state + chunk**2 * (D + E) * (5 if corrected else 2)
    one_chunk += 2 * chunk**3 * (corrected + momentum)
    return round(passes * tokens / chunk * value_heads * one_chunk)


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.clplat.delta_memory_forward)
def _forward_flops(q: Shape, k: Shape, v: Shape, rate: Shape, decay: Any, momentum: Any, *rest: Any, **_: Any) -> int:
    mode, chunk, _keep = rest[-3:]
    return flops(v[0] * v[1], v[2], q[3], v[3], chunk, mode=MODES[mode], momentum=momentum is not None)


@register_flop_formula(torch.ops.clplat.delta_memory_backward)
def _backward_flops(q: Shape, k: Shape, v: Shape, rate: Shape, decay: Any, momentum: Any, *rest: Any, **_: Any) -> int:
    mode, chunk = rest[-2:]
    sizes = (v[0] * v[1], v[2], q[3], v[3], chunk)
    return flops(*sizes, mode=MODES[mode], momentum=momentum is not None, passes=2.5)
