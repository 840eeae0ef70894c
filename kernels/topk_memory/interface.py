"""`topk_read`: checks its arguments and gives them to the blocked PyTorch form or to the Triton kernels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat.kernels.backends import chosen_form, device_obstacle, hopper_obstacle
from clplat.kernels.topk_memory.arguments import check
from clplat.kernels.topk_memory.reference import TopkRead, read_blocked, read_whole

Backend = Literal["auto", "torch", "triton", "reference"]
LARGEST_K, LARGEST_WIDTH = 32, 1024


def topk_read(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    valid: Tensor | int | None = None,
    backend: Backend = "auto",
) -> TopkRead:
    """Reads the k slots whose keys fit each query best: the softmax of their scores over τ weighs their values.

    q (…, D), keys (S, D), values (S, E): one memory for all queries; equal scores go to the lowest slot. `temperature`
    is τ. `valid` says which slots exist: the first so many, as an integer or (then nothing waits for the device) as a
    tensor of one, or (S,) bool; default all. `reference.py` defines the result, docs/topk_memory.md has the details.

    `backend`: `auto` takes the Triton kernels on GPUs of compute capability 8.0 and higher and the blocked PyTorch form
    elsewhere and under `torch.func`; `triton` never falls back; `reference` is the definition, with all scores in
    memory.
    Raises ValueError for shapes, types and values that no form, or not the one asked for, supports.
    """
    if torch.is_autocast_enabled(q.device.type):
        narrow = torch.get_autocast_dtype(q.device.type)
        with torch.autocast(q.device.type, enabled=False):
            return topk_read(
                q.to(narrow), keys.to(narrow), values.to(narrow), k, temperature=temperature, valid=valid,
                backend=backend,
            )  # fmt: skip
    check(q, keys, values, k, temperature, valid)
    form = which_backend(q, keys, values, k, backend=backend)
    count, mask = _count_and_mask(valid, keys)
    rows = q.reshape(-1, q.shape[-1])
    # Without a query there is nothing to launch.
    if form == "triton" and len(rows):
        from clplat.kernels.topk_memory.op import fused

        found = fused(rows, keys, values, k, temperature, count, mask)
    else:
        function = read_whole if form == "reference" else read_blocked
        found = function(rows, keys, values, k, temperature, count, mask)
    output, indices, weights = (part.reshape(*q.shape[:-1], part.shape[1]) for part in found[:3])
    return TopkRead(output, indices, weights, found.mass)


def which_backend(q: Tensor, keys: Tensor, values: Tensor, k: int, *, backend: Backend = "auto") -> str:
    """The form that `topk_read` takes for these tensors, for logs; raises ValueError as `topk_read` does."""
    return chosen_form(backend, "reference", lambda: _obstacle(q, keys, values, k), on_gpu=q.is_cuda)


def _obstacle(q: Tensor, keys: Tensor, values: Tensor, k: int) -> str:
    """Why the kernels cannot compute these tensors; empty where they can."""
    if found := device_obstacle(q):
        return found
    types = (torch.bfloat16, torch.float16, torch.float32)
    if not q.dtype == keys.dtype == values.dtype or q.dtype not in types:
        given = ", ".join(str(part.dtype) for part in (q, keys, values))
        return f"q, keys, values are {given}; the kernels take one of {', '.join(map(str, types))}"
    if max(q.shape[-1], values.shape[-1]) > LARGEST_WIDTH:
        return f"keys are {q.shape[-1]} and values {values.shape[-1]} wide; the kernels go up to {LARGEST_WIDTH}"
    if k > LARGEST_K:
        return f"k is {k}; the kernels go up to {LARGEST_K}"
    return hopper_obstacle(q)


def _count_and_mask(valid: Tensor | int | None, keys: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The number of valid slots (1,) and which ones are (S,); None is all."""
    if isinstance(valid, Tensor):
        return (None, valid) if valid.dtype == torch.bool else (valid.reshape(1), None)
    if valid is None or valid == len(keys):
        return None, None
    return torch.full((1,), valid, dtype=torch.int32, device=keys.device), None
