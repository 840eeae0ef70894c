"""What `topk_read` refuses: shapes, types and numbers; nothing that lies on a GPU is read for it."""

from __future__ import annotations

import torch
from torch import Tensor


def check(q: Tensor, keys: Tensor, values: Tensor, k: int, temperature: float, valid: Tensor | int | None) -> None:
    """Raises ValueError with the argument's name, what it must be and what it is."""
    for name, part in (("q", q), ("keys", keys), ("values", values)):
        if not (isinstance(part, Tensor) and part.is_floating_point()):
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name}: must be a tensor of floating-point numbers, got {kind}")
        if part.device != q.device:
            raise ValueError(f"{name}: is on {part.device}, q on {q.device}; move them together")
    if keys.ndim != 2 or not keys.numel():
        raise ValueError(f"keys: must be (slots, D) with at least one slot and feature, got {tuple(keys.shape)}")
    if not q.ndim or q.shape[-1] != keys.shape[1]:
        raise ValueError(f"q: must be (…, D) with the keys' D = {keys.shape[1]}, got {tuple(q.shape)}")
    if values.ndim != 2 or len(values) != len(keys) or not values.numel():
        raise ValueError(f"values: must be (slots, E) for the keys' {len(keys)} slots, got {tuple(values.shape)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: must be a whole number of slots, at least 1, got {k!r}")
    if isinstance(temperature, Tensor) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: must be a number above 0 (scale q by a learned one), got {temperature!r}")
    _check_valid(valid, keys)


def _check_valid(valid: Tensor | int | None, keys: Tensor) -> None:
    slots = len(keys)
    if isinstance(valid, Tensor):
        boolean, counts = valid.dtype == torch.bool, valid.dtype in (torch.int32, torch.int64)
        if not (boolean and valid.shape == (slots,)) and not (counts and valid.numel() == 1):
            raise ValueError(
                f"valid: must be a number of slots, as a tensor of one integer too, or (slots,) = ({slots},) of bool, "
                f"got {tuple(valid.shape)} of {valid.dtype}"
            )
        if valid.device != keys.device:
            raise ValueError(f"valid: is on {valid.device}, keys on {keys.device}; move them together")
    elif valid is not None and (isinstance(valid, bool) or not isinstance(valid, int) or not 0 <= valid <= slots):
        raise ValueError(f"valid: must be a number of slots from 0 to {slots}, got {valid!r}")
