"""Compiles every kernel of an operation for a Hopper GPU where there is none, and says what each would occupy.

    python tests/support/hopper_compiler.py                  # delta_memory
    python tests/support/hopper_compiler.py topk_memory
    python tests/support/hopper_compiler.py mlp_memory
    python tests/support/hopper_compiler.py selective_scan
    python tests/support/hopper_compiler.py self_modifying

Run as a program of its own: Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import sys

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from clplat.kernels.delta_memory.launch import EndAdjoints, backward, forward
from clplat.kernels.delta_memory.reference import MODES, Inputs, MemoryState
from clplat.kernels.mlp_memory import launch as mlp
from clplat.kernels.mlp_memory.layout import Layout
from clplat.kernels.mlp_memory.reference import Rule
from clplat.kernels.selective_scan import launch as scan
from clplat.kernels.self_modifying import Inputs as SelfModifyingInputs
from clplat.kernels.self_modifying import Readouts, SelfModifyingState
from clplat.kernels.self_modifying import Rule as SelfModifyingRule
from clplat.kernels.self_modifying import launch as modifying
from clplat.kernels.self_modifying.layout import Layout as SelfModifyingLayout
from clplat.kernels.topk_memory import launch as topk
from clplat.kernels.topk_memory.routing import counted
from clplat.kernels.topk_memory.tuning import ALTERNATIVES, plan_for

TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
SCALARS = {int: "i32", float: "fp32"}
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
        signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else SCALARS[type(value)]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    options = {name: named[name] for name in LAUNCH if name in named}
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
    forward(inputs, state, bounds, keep=False, **how)
    *_, kept = forward(inputs, state, bounds, keep=True, **how)
    backward(inputs, state, bounds, kept, rows, EndAdjoints(W, W, W), **how)


def compile_delta_memory() -> None:
    compile_all("exact", width=64, momentum=True, packed=False)
    compile_all("frozen", width=128, momentum=True, packed=True)
    compile_all("gdn", width=128, momentum=False, packed=False)
    compile_all("hebb", width=64, momentum=False, packed=False)


def compile_topk_memory() -> None:
    lists = next(plan for plan in ALTERNATIVES.values() if plan.search == "lists")
    q, keys = torch.zeros(4096, 64, dtype=torch.bfloat16), torch.zeros(65_536, 64, dtype=torch.bfloat16)
    indices, weights = torch.zeros(4096, 8, dtype=torch.int64), torch.zeros(4096, 8)
    count, mask = torch.zeros(1, dtype=torch.int32), torch.zeros(65_536, dtype=torch.bool)
    topk.forward(q, keys, keys, count, None, 8, 0.5)
    topk.backward(q, keys, keys, indices, weights, q, weights, 0.5)
    topk.searched(q, keys, count, mask, 8, lists)
    wide = torch.zeros(256, 1024, dtype=torch.bfloat16)
    topk.searched(wide, wide, None, None, 8, plan_for(256, 256, 1024, 8, torch.bfloat16))
    counted(torch.zeros(4096, dtype=torch.int64), 64)


def compile_mlp(*, width: int, chunk: int, momentum: bool, packed: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """A memory of layers four times as wide inside, each way that `walk` is launched, and the way back."""
    tokens = 1024 + 8 * packed
    bounds = torch.tensor([0, tokens], dtype=torch.int32) if packed else None
    offset = torch.zeros(1, dtype=torch.int32) if packed else None
    rows, gates = torch.zeros(1, tokens, 2, width, dtype=dtype), torch.zeros(1, tokens, 2)
    inputs = Inputs(rows, rows, rows, gates, gates, gates if momentum else None)
    states = torch.zeros(1, 2, 1 + momentum + packed, 8 * width * width)
    layout = Layout.of(inputs, states, offset, bounds, Rule(residual=True), chunk)
    starts = mlp.forward(inputs, states, offset, bounds, layout, keep=True)[2]
    ready = mlp.prepared(inputs, offset, bounds, layout)
    mlp.walked(inputs, ready, mlp._begun(states, layout), offset, bounds, layout, o=rows)
    mlp.backward(inputs, states, offset, bounds, starts, rows, None, layout)


def compile_mlp_memory() -> None:
    # The widest of each kind of arithmetic, and a usual one; the more there are the longer `make test` takes.
    compile_mlp(width=128, chunk=64, momentum=True, packed=False)
    compile_mlp(width=64, chunk=32, momentum=True, packed=False, dtype=torch.float32)
    compile_mlp(width=64, chunk=16, momentum=False, packed=True)


def compile_selective_scan() -> None:
    for state in (16, 128):
        x, b, first = torch.zeros(2, 64, 512), torch.zeros(2, 64, state), torch.zeros(2, state, 512)
        for keep in (None, x[:, :, 0]):
            scan.forward(x, x, first[0], b, b, first, keep, 32)
            scan.backward(x, x, first[0], b, b, keep, first.repeat(2, 1, 1, 1), x, first, 32)


def compile_modifying(*, chunk: int, momentum: bool, packed: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """Matrices of 64, with whatever else a call can have."""
    tokens = 512 + 8 * packed
    bounds = torch.tensor([0, tokens], dtype=torch.int32) if packed else None
    rows, gates = torch.zeros(1, tokens, 2, 64, dtype=dtype), torch.zeros(1, tokens, 2)
    own = torch.zeros(1, tokens, 2, 4, 64, dtype=dtype)
    inputs = SelfModifyingInputs(own, rows, *(gates, gates) if momentum else (None, None))
    read, bias, W = torch.zeros(2, 64), torch.zeros(2), torch.zeros(1, 5, 2, 64, 64)
    S, anchor, offset = W if momentum else None, W if packed else None, torch.zeros(1, dtype=torch.int32)
    state = SelfModifyingState(W, S, anchor, offset if packed else None)
    layout = SelfModifyingLayout.of(
        own, rows, W, SelfModifyingRule(), chunk, momentum=momentum, packed=packed, offsets=packed
    )  # fmt: skip
    readouts = Readouts(read, bias, read, bias)
    kept = modifying.forward(inputs, readouts, state, bounds, layout, keep=True)[2]
    assert kept is not None
    modifying.backward(
        inputs, readouts, state, bounds, layout, kept, rows, SelfModifyingState(W, S, anchor)
    )  # fmt: skip


def compile_self_modifying() -> None:
    compile_modifying(chunk=64, momentum=True, packed=True)
    compile_modifying(chunk=32, momentum=True, packed=False, dtype=torch.float32)
    compile_modifying(chunk=16, momentum=False, packed=False)


if __name__ == "__main__":
    JITFunction.run = compiled_instead
    known = {
        "delta_memory": compile_delta_memory, "mlp_memory": compile_mlp_memory,
        "selective_scan": compile_selective_scan, "self_modifying": compile_self_modifying,
        "topk_memory": compile_topk_memory,
    }  # fmt: skip
    known[(sys.argv[1:] or ["delta_memory"])[0]]()
