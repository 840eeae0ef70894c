"""With how many warps the kernels run, as timed in whole blocks on an H200 (docs/results/memory_blocks.md:
bf16, chunks of 64, 64 wide).

`benchmarks/memory_blocks.py --warps` times others.
"""

from __future__ import annotations

from clplat.kernels.self_modifying.layout import Layout


def options(kernel: str, layout: Layout) -> dict[str, int]:
    """Constants of a launch: warps, stages of pipelined loads."""
    eight = kernel == "write_back" or layout.dtype.itemsize > 2
    return {"num_warps": 8 if eight else 4, "num_stages": 1}
