"""Compiles every `delta_memory` kernel for a Hopper GPU where there is none, and says what each would occupy.

    python tests/support/hopper_compiler.py

Run as a program of its own: Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from clplat.kernels.delta_memory.launch import EndAdjoints, backward, forward
from clplat.kernels.delta_memory.reference import MODES, Inputs, MemoryState

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
LAUNCH = ("num_warps", "num_stages")


def compiled_instead(kernel, *arguments, grid, warmup, **named) -> None:
    """Stands in for a launch: compiles for the arguments at hand."""
    values = dict(zip((p.name for p in kernel.params), arguments)) | named
    signature, constants, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    options = {name: named[name] for name in LAUNCH}
    made = compile_kernel(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    print(kernel.fn.__name__, made.metadata.shared, flush=True)


def compile_all(mode: str, *, width: int, momentum: bool, packed: bool) -> None:
    tokens, bounds = 128, torch.tensor([0, 128], dtype=torch.int32) if packed else None
    rows, gates = torch.zeros(1, tokens, 2, width, dtype=torch.bfloat16), torch.zeros(1, tokens, 2)
    inputs = Inputs(rows, rows, rows, gates, gates, gates if momentum else None)
    W = torch.zeros(1, 2, width, width)
    offset = torch.zeros(1, dtype=torch.int32)
    state = MemoryState(W, W if momentum else None, W, offset) if packed else MemoryState(W, W if momentum else None)
    how = {"mode": MODES.index(mode), "chunk": 64}
    *_, kept = forward(inputs, state, bounds, keep=True, **how)
    backward(inputs, state, bounds, kept, rows, EndAdjoints(W, W, W), **how)


if __name__ == "__main__":
    JITFunction.run = compiled_instead
    compile_all("exact", width=64, momentum=True, packed=False)
    compile_all("frozen", width=128, momentum=True, packed=True)
    compile_all("gdn", width=128, momentum=False, packed=False)
    compile_all("hebb", width=64, momentum=False, packed=False)
