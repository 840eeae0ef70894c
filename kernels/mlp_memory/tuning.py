"""In which blocks and with how many warps the kernels run.

Nothing here is measured: blocks are as large as keeps registers from spilling and shared memory in bounds, as compiled
for Hopper. `benchmarks/mlp_memory.py --alternatives` times others.
"""

from __future__ import annotations

from clplat.kernels.mlp_memory.layout import Layout


def options(kernel: str, layout: Layout) -> dict[str, int]:
    """Constants of a launch: inner features that a program holds at once (BJ), warps, stages of pipelined loads."""
    if kernel in ("prepare", "gates"):
        return {"num_warps": 4 if kernel == "prepare" else 1, "num_stages": 1}
    if layout.dtype.itemsize > 2:
        return {"BJ": 16, "num_warps": 4 if layout.C == 16 else 8, "num_stages": 1}
    wide = max(layout.D, layout.E) > 64
    block = {16: 64, 32: 64, 64: 32}[layout.C] // (1 + wide)
    return {"BJ": block, "num_warps": 8, "num_stages": 1}


def reads_apart(layout: Layout) -> bool:
    """Whether the walk only writes, and all groups of chunks are walked once more, at once, to read.

    The walk of one sequence and head is one program; where these are fewer than a card has multiprocessors, what the
    second walk costs is less than what reading adds to each of the first one's steps.
    """
    return layout.N * layout.V <= 132 and layout.group_slots > 1
