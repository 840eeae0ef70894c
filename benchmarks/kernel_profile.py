"""Which of `delta_memory`'s kernels a call's time goes to, on a GPU.

    python benchmarks/kernel_profile.py --cases frozen --shapes 8,4096,16,128

Milliseconds a call by `torch.profiler`, over ten calls whose inputs lie in no cache of ours: of each kernel, and their
sum, which leaves out the gaps between two launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch
from kernel_cases import FAMILY, Case, drawn, ours, work
from torch.profiler import ProfilerActivity, profile

from kernels import shape_of

CALLS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["gdn", "hebb", "frozen", "exact"], default=["frozen"])
    parser.add_argument("--shapes", nargs="+", type=shape_of("B,T,H,D"), default=[(8, 4096, 16, 128)], help="B,T,H,D …")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU: kernels are timed on one")
    print(torch.cuda.get_device_name(), flush=True)
    members = [member for member in FAMILY if member[0] in options.cases]
    for member, size, backward in product(members, options.shapes, [False, True]):
        case = Case(*member, size)
        title = f"{case.name} {case.size} {'forward + backward' if backward else 'forward'}"
        show(title, work(ours(case, "triton"), *drawn(case, "cuda", torch.bfloat16), backward))


def show(title: str, do: Callable[[], object]) -> None:
    """Prints a line for each kernel of one call."""
    do()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            do()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / CALLS / 1e3 for event in profiler.key_averages()}
    found = {name: time for name, time in sorted(found.items(), key=lambda item: -item[1]) if time > 1e-3}
    print(f"\n{title}: {sum(found.values()):.3f} ms")
    for name, time in found.items():
        print(f"  {time:.3f}  {name[:80]}", flush=True)


if __name__ == "__main__":
    main()
