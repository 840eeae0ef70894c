"""What a small kernel takes when several processes launch chains of them on one card at once.

    python benchmarks/shared_card.py --processes 2                 # as processes share a card by themselves
    nvidia-cuda-mps-control -d                                     # then again, under NVIDIA's Multi-Process Service
    python benchmarks/shared_card.py --processes 2 --device cpu    # the script itself

Each process records a chain of kernels on 64 x 64 numbers as one CUDA graph, waits for the others, and replays it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

LENGTH = 2000
"""Kernels of a chain."""


def chain(device: str) -> Callable[[], object]:
    """What launches the whole chain."""
    x = torch.randn(64, 64, device=device)

    def run() -> torch.Tensor:
        y = x
        for _ in range(LENGTH):
            y = y.tanh()
        return y

    if device == "cpu":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(rank: int, device: str, times: int, ready: mp.Barrier, found: mp.Queue) -> None:
    """Microseconds a kernel of one process, put into `found`."""
    replay = chain(device)
    replay()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    ready.wait()
    start = time.perf_counter()
    for _ in range(times):
        replay()
    wait()
    found.put(1e6 * (time.perf_counter() - start) / (times * LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--times", type=int, default=200, help="how often each chain is replayed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    ready, found = context.Barrier(options.processes), context.Queue()
    mp.start_processes(
        timed, (options.device, options.times, ready, found), nprocs=options.processes, start_method="spawn"
    )
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    each = ", ".join(f"{found.get():.2f}" for _ in range(options.processes))
    print(f"{card}, torch {torch.__version__}, {options.processes} at once: {each} microseconds a kernel")


if __name__ == "__main__":
    main()
