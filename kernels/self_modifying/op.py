"""The Triton kernels as two PyTorch operators, with shapes for the compiler, autograd and FLOP counts.

`clplat::self_modifying_forward` and `clplat::self_modifying_backward` take only tensors and numbers, so that
torch.compile and CUDA graphs see one opaque step each. What an operator does not return is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from clplat.kernels.mlp_memory.layout import may_end_inside
from clplat.kernels.self_modifying.layout import Layout
from clplat.kernels.self_modifying.reference import DELTAS, Inputs, Readouts, Rule, SelfModifyingState

Given = tuple[Tensor | None, ...]


def fused(
    inputs: Inputs, readouts: Readouts, *, rule: Rule, chunk: int, state: SelfModifyingState, cu_seqlens: Tensor | None
) -> tuple[Tensor, SelfModifyingState]:
    """`self_modifying` by the kernels; arguments are checked already."""
    given = (*inputs, *readouts, *state[:3])
    if not torch.compiler.is_compiling() and any(map(_has_tangent, given)):
        raise ValueError("backend: the kernels know no forward-mode derivatives; ask for backend='torch'")
    gates = (None if gate is None else gate.to(state.W.dtype) for gate in inputs[2:])
    inputs = Inputs(inputs.x, inputs.q, *gates)
    keep = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in given)
    kind = (DELTAS.index(rule.delta), rule.max_rate, rule.max_gradient, rule.unit_values, rule.self_targets)
    o, W, S, anchor, *_ = torch.ops.clplat.self_modifying_forward(
        *inputs, *readouts, *state, cu_seqlens, *kind, chunk, keep
    )
    end = SelfModifyingState(W, None if state.S is None else S)
    if not may_end_inside(inputs.x.shape[1], chunk, packed=cu_seqlens is not None, offsets=state.offset is not None):
        return o, end
    offset = _written(inputs, state, cu_seqlens, chunk)
    return o, end._replace(anchor=torch.where((offset == 0)[:, None, None, None, None], W, anchor), offset=offset)


def _has_tangent(part: Tensor | None) -> bool:
    return part is not None and torch.autograd.forward_ad.unpack_dual(part).tangent is not None


def _written(inputs: Inputs, state: SelfModifyingState, cu_seqlens: Tensor | None, chunk: int) -> Tensor:
    """Tokens in every sequence's open chunk."""
    if cu_seqlens is None:
        lengths = torch.full((len(state.W),), inputs.x.shape[1], dtype=torch.int32, device=state.W.device)
    else:
        lengths = cu_seqlens.diff().to(torch.int32)
    return (lengths if state.offset is None else lengths + state.offset) % chunk


def _parts(
    tensors: Given, rule: Rule, chunk: int
) -> tuple[Inputs, Readouts, SelfModifyingState, Tensor | None, Layout]:
    """The operators' tensors by name, as the kernels want them to lie, and the sizes of a launch."""
    x, q = (part if part is None or part.stride(-1) == 1 else part.contiguous() for part in tensors[:2])
    rest = [None if part is None else part.contiguous() for part in tensors[2:]]
    assert x is not None and q is not None
    inputs, readouts = Inputs(x, q, *rest[:2]), Readouts(*rest[2:6])  # type: ignore[arg-type]
    state, cu = SelfModifyingState(*rest[6:10]), rest[10]  # type: ignore[arg-type]
    layout = Layout.of(
        x,
        q,
        state.W,
        rule,
        chunk,
        momentum=state.S is not None,
        packed=cu is not None,
        offsets=state.offset is not None,
    )
    return inputs, readouts, state, cu, layout


def _rule(delta: int, max_rate: float, max_gradient: float | None, unit_values: bool, self_targets: bool) -> Rule:
    return Rule(
        delta=DELTAS[delta], max_rate=max_rate, max_gradient=max_gradient, unit_values=unit_values,  # type: ignore[arg-type]
        self_targets=self_targets,
    )  # fmt: skip


@torch.library.custom_op("clplat::self_modifying_forward", mutates_args=())
def forward_op(
    x: Tensor, q: Tensor, log_momentum: Tensor | None, damping: Tensor | None, rate: Tensor, rate_bias: Tensor,
    decay: Tensor | None, decay_bias: Tensor | None, W: Tensor, S: Tensor | None, anchor: Tensor | None,
    offset: Tensor | None, cu_seqlens: Tensor | None, delta: int, max_rate: float, max_gradient: float | None,
    unit_values: bool, self_targets: bool, chunk: int, keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """o, the end state's W, S and anchor, and what the backward pass needs: `launch.Kept`."""
    from clplat.kernels.self_modifying.launch import forward

    tensors = (x, q, log_momentum, damping, rate, rate_bias, decay, decay_bias, W, S, anchor, offset, cu_seqlens)
    parts = _parts(tensors, _rule(delta, max_rate, max_gradient, unit_values, self_targets), chunk)
    o, end, kept = forward(*parts, keep=keep)
    found = (o, *end[:3], *(kept or (None,) * 8))
    return tuple(x.new_empty(0) if part is None else part for part in found)  # type: ignore[return-value]


@forward_op.register_fake
def _forward_shapes(
    x: Tensor, q: Tensor, log_momentum: Tensor | None, damping: Tensor | None, rate: Tensor, rate_bias: Tensor,
    decay: Tensor | None, decay_bias: Tensor | None, W: Tensor, S: Tensor | None, anchor: Tensor | None,
    offset: Tensor | None, cu_seqlens: Tensor | None, delta: int, max_rate: float, max_gradient: float | None,
    unit_values: bool, self_targets: bool, chunk: int, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from clplat.kernels.self_modifying.launch import room

    rule = _rule(delta, max_rate, max_gradient, unit_values, self_targets)
    given = (x, q, log_momentum, damping, rate, rate_bias, decay, decay_bias, W, S, anchor, offset, cu_seqlens)
    layout = _parts(given, rule, chunk)[-1]
    kept = room(q, layout, keep=True) if keep else (None,) * 8
    parts = (W, S, W if layout.open_chunk else None, *kept)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        *(x.new_empty(0) if part is None else torch.empty_like(part) for part in parts),
    )


@torch.library.custom_op("clplat::self_modifying_backward", mutates_args=())
def backward_op(
    x: Tensor, q: Tensor, log_momentum: Tensor | None, damping: Tensor | None, rate: Tensor, rate_bias: Tensor,
    decay: Tensor | None, decay_bias: Tensor | None, W: Tensor, S: Tensor | None, anchor: Tensor | None,
    offset: Tensor | None, cu_seqlens: Tensor | None, keys: Tensor, differences: Tensor, kept_W: Tensor,
    kept_S: Tensor, slopes: Tensor, answers: Tensor, squares: Tensor, made: Tensor, do: Tensor, dW: Tensor | None,
    dS: Tensor | None, danchor: Tensor | None, delta: int, max_rate: float,
    max_gradient: float | None, unit_values: bool, self_targets: bool, chunk: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Adjoints of the first eleven tensors; None for that of an end state's part means zero."""
    from clplat.kernels.self_modifying.launch import Kept, backward

    tensors = (x, q, log_momentum, damping, rate, rate_bias, decay, decay_bias, W, S, anchor, offset, cu_seqlens)
    parts = _parts(tensors, _rule(delta, max_rate, max_gradient, unit_values, self_targets), chunk)
    wanted = (True, S is not None, parts[-1].open_chunk)
    given = [
        torch.zeros_like(parts[2].W) if part is None else part.clone(memory_format=torch.contiguous_format)
        for part in (dW, dS, danchor)
    ]
    ends: Any = [part if is_wanted else None for part, is_wanted in zip(given, wanted, strict=True)]
    parted = (keys, differences, kept_W, kept_S, slopes, answers, squares, made)
    kept = Kept(*(part if part.numel() or not x.numel() else None for part in parted))  # type: ignore[arg-type]
    found = backward(*parts, kept, do.contiguous(), SelfModifyingState(*ends))
    named = (*found.inputs, *found.readouts, *found[2:])
    return tuple(x.new_empty(0) if part is None else part for part in named)  # type: ignore[return-value]


@backward_op.register_fake
def _backward_shapes(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(0) if part is None else torch.empty(part.shape, dtype=part.dtype, device=part.device)
        for part in (x, *rest[:10])
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta, max_rate, max_gradient, unit_values, self_targets, chunk, keep = inputs
    if not keep:
        raise RuntimeError("self_modifying_forward was called with keep=False for tensors that need gradients")
    ctx.kind = (delta, max_rate, max_gradient, unit_values, self_targets, chunk)
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.mark_non_differentiable(*output[4:])
    # Else zeros as large as all kept states would be made, for nothing.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, do: Tensor | None, dW: Tensor | None, dS: Tensor | None, danchor: Tensor | None, *rest: Any
) -> Given:  # fmt: skip
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[1]) if do is None else do
    dS = None if saved[9] is None else dS
    found = torch.ops.clplat.self_modifying_backward(*saved, do, dW, dS, danchor, *ctx.kind)
    gradients = [None if part is None else gradient for part, gradient in zip(saved[:11], found, strict=True)]
    return (*gradients, *(None,) * 9)


forward_op.register_autograd(_backward, setup_context=_setup)


def flops(tokens: int, heads: int, width: int, matrices: int, chunk: int, *, erases: bool, momentum: bool) -> int:
    """Multiplications and additions of the chunked form's matrix products, forward."""
    # Made: a key, a value. Each matrix: its slopes, a write; what is erased asks for its answer; the same of momentum.
    squares = 2 + matrices * (2 + erases + momentum * (1 + erases)) + 1 + momentum
    one_chunk = 2 * chunk * width**2 * squares
    # Queries meet keys, and what they read of steps and erasings; keys meet keys, and the system is solved.
    one_chunk += 2 * chunk**2 * width * (2 + erases + erases * (1 + 2 * matrices)) + 2 * chunk**3 * momentum
    return round(tokens / chunk * heads * one_chunk)


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.clplat.self_modifying_forward)
def _forward_flops(x: Shape, *rest: Any, **_: Any) -> int:
    return _counted(rest[0], rest[7], rest[8], delta=rest[12], chunk=rest[17])


@register_flop_formula(torch.ops.clplat.self_modifying_backward)
def _backward_flops(x: Shape, *rest: Any, **_: Any) -> int:
    return 2 * _counted(rest[0], rest[7], rest[8], delta=rest[24], chunk=rest[29])


def _counted(q: Shape, W: Shape, S: Shape | None, *, delta: int, chunk: int) -> int:
    erases = DELTAS[delta] != "none"
    return flops(q[0] * q[1], q[2], q[3], W[1], chunk, erases=erases, momentum=S is not None)
