"""`least_squares`: checks its arguments and gives them to the chunked form or to the recursion."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat.kernels.least_squares.reference import Inputs, SquaresState, chunked, empty_state, recurrent

Backend = Literal["chunked", "recurrent"]


def least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    log_forget: Tensor | None = None,
    *,
    ridge: float = 1e-3,
    chunk: int = 64,
    state: SquaresState | None = None,
    backend: Backend = "chunked",
) -> tuple[Tensor, SquaresState]:
    """Outputs (B, T, H, E) in v's type, each from the exact solution to all pairs up to its own, and the last state.

    q, k (B, T, H, D), v (B, T, H, E); `weight` ≥ 0 and `log_forget` ≤ 0 (B, T, H), by default 1 and 0: nothing is
    forgotten. What is solved stands in `reference.py`. Computed in float32 or wider; small ridges want float64, as P
    begins at 1 / ridge. `chunk` changes speed and rounding alone: where P over the share of the past that is left after
    a chunk comes near the inverse of the precision, torch refuses to factor, and smaller chunks are needed. `state`
    continues an earlier call, whose ridge stays.
    Differentiable. Plain PyTorch on every device. Raises ValueError for shapes and values that do not fit.
    """
    _check(q, k, v, {"weight": weight, "log_forget": log_forget}, ridge, chunk, backend)
    wide = torch.promote_types(v.dtype, torch.float32)
    gates = [
        q.new_full(q.shape[:3], float(default), dtype=wide) if gate is None else gate
        for gate, default in ((weight, 1), (log_forget, 0))
    ]
    with torch.autocast(q.device.type, enabled=False):
        inputs = Inputs(*(part.transpose(1, 2).to(wide) for part in (q, k, v, *gates)))
        state = empty_state(inputs, ridge) if state is None else SquaresState(*(part.to(wide) for part in state))
        found = recurrent(inputs, state) if backend == "recurrent" else chunked(inputs, state, chunk)
    return found[0].transpose(1, 2).to(v.dtype), found[1]


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor | None], ridge: float, chunk: int, backend: str
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (q, k, v))
        raise ValueError(f"q, k, v: must be (B, T, H, D), the same, and (B, T, H, E), got {shapes}")
    for name, gate in gates.items():
        if gate is not None and gate.shape != k.shape[:3]:
            raise ValueError(f"{name}: must be {tuple(k.shape[:3])}, got {tuple(gate.shape)}")
    if ridge <= 0:
        raise ValueError(f"ridge: must be above 0, got {ridge}")
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1, got {chunk}")
    if backend not in ("chunked", "recurrent"):
        raise ValueError(f"backend: must be chunked or recurrent, got {backend!r}")
