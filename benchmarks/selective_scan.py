"""How fast Mamba's scan in chunks, and on a GPU by its kernels, trains beside one token after the other.

    python benchmarks/selective_scan.py                                  # on a CPU
    python benchmarks/selective_scan.py --device cuda --shape 8 1024 1024 16 --chunks 64 256 512 1024

Forward and backward pass of the scan alone, in float32; medians over repetitions that alternate between the forms. The
peak is that of memory beyond the inputs (CUDA only). CPU time says more than the clock where a machine is shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels.selective_scan import selective_scan, token_loop


def given(options: argparse.Namespace) -> list[Tensor]:
    """x, step, rate, B, C and the first state, as Mamba begins with them."""
    rows, tokens, channels, numbers = options.shape
    torch.manual_seed(options.seed)
    parts = [
        torch.randn(rows, tokens, channels),
        F.softplus(torch.randn(rows, tokens, channels) - 4.6),
        -torch.arange(1.0, numbers + 1).unsqueeze(1).repeat(1, channels),
        torch.randn(rows, tokens, numbers),
        torch.randn(rows, tokens, numbers),
        torch.zeros(rows, numbers, channels),
    ]
    return [part.to(options.device).requires_grad_() for part in parts]


def forms(options: argparse.Namespace, parts: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    keep = torch.ones(parts[0].shape[:2], device=parts[0].device)

    def chunked(chunk: int) -> Callable[[], Tensor]:
        return lambda: selective_scan(*parts[:5], first_BNC=parts[5], chunk=chunk, backend="torch")[0]

    found = {"token loop": lambda: token_loop(*parts, keep)[0]} | {f"chunk {c}": chunked(c) for c in options.chunks}
    if options.device != "cpu":
        found["kernels"] = lambda: selective_scan(*parts[:5], first_BNC=parts[5], backend="triton")[0]
    return found


def seconds(form: Callable[[], Tensor], parts: list[Tensor]) -> tuple[float, float]:
    """One forward and backward pass: on the clock, and of this process's CPU time."""
    cuda = parts[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    torch.autograd.grad(form().sum(), parts)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def peak(form: Callable[[], Tensor], parts: list[Tensor]) -> float:
    """MiB beyond what is there already."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds(form, parts)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=4, default=[8, 256, 512, 16], help="rows, tokens, channels, state")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts = given(options)
    compared = forms(options, parts)
    expected = compared["token loop"]().detach()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for repeat in range(options.repeats + 1):
        for name, form in compared.items():
            taken = seconds(form, parts)
            if repeat:  # the first round warms up
                times[name].append(taken)
    medians = {name: [1e3 * statistics.median(part) for part in zip(*taken)] for name, taken in times.items()}
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, shape {options.shape}")
    print("form | ms | CPU ms | ratio | ratio of CPU time | largest difference | peak MiB")
    for name, form in compared.items():
        (clock, cpu), (loop_clock, loop_cpu) = medians[name], medians["token loop"]
        cells = [f"{clock:.0f}", f"{cpu:.0f}", f"{loop_clock / clock:.2f}", f"{loop_cpu / cpu:.2f}"]
        difference = float((form().detach() - expected).abs().max())
        memory = f"{peak(form, parts):.0f}" if parts[0].is_cuda else "–"
        print(" | ".join([name, *cells, f"{difference:.1g}", memory]))


if __name__ == "__main__":
    main()
