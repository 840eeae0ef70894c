"""In which blocks and with how many warps the kernels run.

Nothing here is measured yet: docs/mlp_memory.md says what to try first.
"""

from __future__ import annotations

from clplat.kernels.mlp_memory.layout import Layout


def options(kernel: str, layout: Layout) -> dict[str, int]:
    """Constants of a launch: inner features that a program holds at once (BJ), warps, stages of pipelined loads."""
    if kernel in ("prepare", "gates"):
        return {"num_warps": 4 if kernel == "prepare" else 1, "num_stages": 1}
    # Eight warps leave each thread 16 registers of a 64 × 64 tile, of which six to ten are alive at once.
    wide = max(layout.D, layout.E) > 64 or layout.dtype.itemsize > 2
    return {"BJ": 32 if wide else 64, "num_warps": 8, "num_stages": 1}


def reads_apart(layout: Layout) -> bool:
    """Whether the walk only writes, and all groups of chunks are walked once more, at once, to read.

    The walk of one sequence and head is one program; where these are fewer than a card has multiprocessors, what the
    second walk costs is less than what reading adds to each of the first one's steps.
    """
    return layout.N * layout.V <= 132 and layout.group_slots > 1
