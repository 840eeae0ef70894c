"""With how many warps the kernels run. Nothing here is measured; `benchmarks/memory_blocks.py --warps` times others."""

from __future__ import annotations

from clplat.kernels.self_modifying.layout import Layout


def options(kernel: str, layout: Layout) -> dict[str, int]:
    """Constants of a launch: warps, stages of pipelined loads."""
    warps = {"walk": 4, "read_back": 4, "write_back": 8}[kernel]
    return {"num_warps": 8 if layout.C == 64 or layout.dtype.itemsize > 2 else warps, "num_stages": 1}
