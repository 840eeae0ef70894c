"""`selective_scan`: two PyTorch operators, each in chunks or as a Triton kernel, with shapes and autograd."""

from __future__ import annotations

from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.kernels.backends import chosen_form, device_obstacle
from clplat.kernels.selective_scan.reference import slopes_through_chunks, through_chunks, token_loop

Backend = Literal["auto", "torch", "triton", "reference"]
KERNEL_CHUNK = 32
"""Tokens between states that the kernels keep: a chunk's states are computed again and then fit the GPU's cache."""


def selective_scan(
    x_BTC: Tensor,
    step_BTC: Tensor,
    rate_NC: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    *,
    first_BNC: Tensor | None = None,
    keep_BT: Tensor | None = None,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Answers (B, T, C) and the last state (B, N, C), in float32 or float64.

    `step_BTC` is Δ ≥ 0 (0 leaves the state as it is), `rate_NC` is A ≤ 0, `first_BNC` the state before the first
    token (None: zero), `keep_BT` is 0 where the state before a token is forgotten and 1 elsewhere (None: 1).

    `backend`: `auto` takes the Triton kernels on GPUs of compute capability 8.0 and higher, and chunks of PyTorch
    elsewhere and under `torch.func`; `triton` never falls back; `reference` is one token after the other. `chunk`
    defaults to 32 tokens for the kernels, which keep B·N·C numbers for every chunk, and in PyTorch to 16 on a CPU,
    whose caches then hold one, and to 512 elsewhere, for fewer launches; there memory beyond the inputs is a few times
    B·chunk·N·C numbers for a moment. Raises ValueError for a backend that there is not or that cannot run here.
    """
    precise = torch.promote_types(x_BTC.dtype, torch.float32)
    x, step, rate, b, c = (part.to(precise) for part in (x_BTC, step_BTC, rate_NC, b_BTN, c_BTN))
    first = x.new_zeros(len(x), *rate.shape) if first_BNC is None else first_BNC.to(precise)
    keep = None if keep_BT is None else keep_BT.to(precise)
    form = chosen_form(backend, "reference", lambda: device_obstacle(x), on_gpu=x.is_cuda)
    if form == "reference":
        return token_loop(x, step, rate, b, c, first, x.new_ones(x.shape[:2]) if keep is None else keep)
    if chunk is None:
        chunk = KERNEL_CHUNK if form == "triton" else 16 if x.device.type == "cpu" else 512
    # functorch knows no such operator; what it transforms is then differentiated operation by operation.
    if form == "torch" and torch._C._are_functorch_transforms_active():
        return through_chunks(x, step, rate, b, c, first, keep, chunk)[:2]
    return forward_op(x, step, rate, b, c, first, keep, chunk, form == "triton")[:2]


@torch.library.custom_op("clplat::selective_scan_forward", mutates_args=())
def forward_op(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, first: Tensor, keep: Tensor | None, chunk: int,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Answers, last state, and the state before each chunk. As one operator, a compiler need not unroll hundreds of
    small steps for every layer."""
    if not fused:
        return through_chunks(x, step, rate, b, c, first, keep, chunk)
    from clplat.kernels.selective_scan.launch import forward

    x, step, rate, b, c, first = (part.contiguous() for part in (x, step, rate, b, c, first))
    return forward(x, step, rate, b, c, first, None if keep is None else keep.contiguous(), chunk)


@torch.library.custom_op("clplat::selective_scan_backward", mutates_args=())
def backward_op(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, keep: Tensor | None, starts: Tensor, slope: Tensor,
    carry: Tensor, chunk: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, step, rate, b, c and the first state."""
    if not fused:
        return slopes_through_chunks(x, step, rate, b, c, keep, starts, slope, carry, chunk)
    from clplat.kernels.selective_scan.launch import backward

    x, step, rate, b, c, slope, carry = (part.contiguous() for part in (x, step, rate, b, c, slope, carry))
    return backward(x, step, rate, b, c, None if keep is None else keep.contiguous(), starts, slope, carry, chunk)


@forward_op.register_fake
def _(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, first: Tensor, keep: Any, chunk: int, _: bool
) -> Any:
    made = (part.new_empty(part.shape) for part in (x, first))
    return *made, first.new_empty(ceil(x.shape[1] / chunk), *first.shape)


@backward_op.register_fake
def _(x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, keep: Any, starts: Tensor, *rest: Any) -> Any:
    return tuple(part.new_empty(part.shape) for part in (x, step, rate, b, c, starts[0]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, keep, ctx.chunk, ctx.fused = inputs
    ctx.save_for_backward(*tensors, keep, output[2])


def _slopes(ctx: Any, slope: Tensor, carry: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *backward_op(*ctx.saved_tensors, slope, carry, ctx.chunk, ctx.fused), None, None, None


forward_op.register_autograd(_slopes, setup_context=_remember)
