"""Which form of an operation takes a call: its Triton kernels where they can run, PyTorch elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from clplat.kernels.assembler import fault_on_hopper


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, as the tests ask for by TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chosen_form(backend: str, definition: str, obstacle: Callable[[], str], *, on_gpu: bool) -> str:
    """`triton`, `torch` or the name of the `definition`, for a `backend` that is one of these or `auto`.

    `auto` takes the kernels on a GPU where there is no `obstacle`, and `torch` under `torch.func`, which does not see
    into kernels; it never picks the interpreter. Raises ValueError for other names, and for `triton` with an obstacle.
    """
    if backend not in ("auto", "torch", "triton", definition):
        raise ValueError(f"backend: must be auto, torch, triton or {definition}, got {backend!r}")
    if backend in ("torch", definition):
        return backend
    if backend == "triton":
        if found := obstacle():
            raise ValueError(f"backend: triton is asked for, but {found}")
        return "triton"
    plain = not on_gpu or torch._C._are_functorch_transforms_active() or obstacle()
    return "torch" if plain else "triton"


def device_obstacle(tensor: Tensor, name: str = "tensors") -> str:
    """Why no kernel can run where the tensor is; empty where they can. `name`: of what it is one."""
    if not tensor.is_cuda:
        if interpreting():
            return ""
        return f"the {name} are on {tensor.device.type}; the kernels need a GPU (or TRITON_INTERPRET=1, to test them)"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return ""


def hopper_obstacle(tensor: Tensor) -> str:
    """Why kernels with tensor cores cannot be compiled for the tensor's GPU; empty where they can."""
    on_hopper = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9
    return fault_on_hopper() if on_hopper else ""
