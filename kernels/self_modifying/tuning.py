"""With how many warps the kernels run: where fewest registers spill, as counted in docs/self_modifying.md.

Nothing here is measured; `benchmarks/memory_blocks.py --warps` times others.
"""

from __future__ import annotations

from clplat.kernels.self_modifying.layout import Layout


def options(kernel: str, layout: Layout) -> dict[str, int]:
    """Constants of a launch: warps, stages of pipelined loads."""
    wide, long = layout.dtype.itemsize > 2, layout.C == 64
    # Without momentum all of `read_back` fits into 4 warps, of which two programs share a multiprocessor.
    eight = {"walk": long, "read_back": long and layout.momentum, "write_back": True, "make_back": False}[kernel]
    return {"num_warps": 8 if eight or wide else 4, "num_stages": 1}
