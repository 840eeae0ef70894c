"""What `topk_read` and `expert_order` take on a GPU: time, memory, error, and ratios to plain PyTorch, compiled too.

    python benchmarks/topk_memory.py                                  # all shapes, bf16
    python benchmarks/topk_memory.py --alternatives --shapes 8192,65536,64,8    # every way to search
    python benchmarks/topk_memory.py --markdown docs/results/topk_memory.md
    python benchmarks/topk_memory.py --toy                            # the script itself, on a CPU, in seconds

A shape is N,S,D,k: queries, slots, width of keys and values, slots a query reads. Times are of the device's events with
its cache emptied before each run; `forward` keeps nothing for a backward pass. The peer is what one would write: all
scores, `torch.topk`, softmax, a gather and a sum, in bf16 as it comes, and the same under `torch.compile`; both are
timed in turns with ours, in the same process. "slots" is the share of chosen slots that the fp64 scores of 256 queries
choose too (the peer rounds scores to bf16), "error" the outputs' distance ‖x − y‖ / ‖y‖ from fp64 on those same slots,
and for the backward pass the largest of the gradients' and the output's, over all queries, from fp64 on the same slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels.topk_memory import expert_order, launch, topk_read
from clplat.kernels.topk_memory.reference import weighted
from clplat.kernels.topk_memory.tuning import ALTERNATIVES, Plan, plan_for
from kernels import Clock, markdown, shape_of, stamp, write

SHAPES = ["8192,65536,64,8", "8192,65536,128,8", "8192,65536,1024,8", "65536,512,256,8", "4096,4096,512,8"]
TOY_SHAPES = ["20,300,16,4"]
ENTRIES = [(16_384, 8), (131_072, 64), (131_072, 256)]
READS = ["N,S,D,k", "pass", "form", "ms", "p20 to p80", "peak MB", "its / ours", "slots", "error"]
ORDERS = ["entries, experts", "form", "ms", "p20 to p80", "its / ours"]
TEMPERATURE, COMPARED = 0.1, 256

Read = tuple[Tensor, Tensor, Tensor]
"""Output, indices and weights."""


def eager(q: Tensor, keys: Tensor, values: Tensor, k: int) -> Read:
    """The read as one would write it."""
    best, indices = (q @ keys.T).topk(k)
    weights = (best / TEMPERATURE).softmax(1)
    return torch.einsum("nk,nke->ne", weights, values[indices]), indices, weights


def ours(q: Tensor, keys: Tensor, values: Tensor, k: int) -> Read:
    return topk_read(q, keys, values, k, temperature=TEMPERATURE)[:3]


def drawn(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Unit queries and keys, values, and what flows back into the output."""
    generator = torch.Generator(device).manual_seed(0)
    N, S, D, _ = shape
    q, keys, values, flowing = (torch.randn(n, D, generator=generator, device=device) for n in (N, S, S, N))
    parts = F.normalize(q, dim=1), F.normalize(keys, dim=1), values, flowing
    return [part.to(dtype) for part in parts]


def work(read: Callable[..., Read], parts: list[Tensor], k: int, backward: bool) -> Callable[[], list[Tensor]]:
    """The read alone, without gradients, or with those of q, keys and values."""
    if not backward:
        return torch.no_grad()(lambda: list(read(*parts[:3], k)))
    leaves = [part.detach().requires_grad_() for part in parts[:3]]

    def both() -> list[Tensor]:
        output, indices, weights = read(*leaves, k)
        return [output.detach(), indices, weights.detach(), *torch.autograd.grad(output, leaves, parts[3])]

    return both


def errors(found: list[Tensor], parts: list[Tensor], k: int) -> list[str]:
    """Share of slots that fp64 chooses too, and the largest relative error on the slots that were chosen."""
    q, keys, values, flowing = parts
    few = q[:COMPARED].double() @ keys.double().T
    least = few.topk(k)[0][:, -1:] - 1e-6
    agreed = (few.gather(1, found[1][:COMPARED]) >= least).double().mean().item()
    leaves = [part.double().requires_grad_() for part in (q, keys, values)]
    outputs, gradients = [], [torch.zeros_like(part) for part in leaves]
    for start in range(0, len(q), 4096):
        rows = slice(start, start + 4096)
        read = weighted(leaves[0][rows], *leaves[1:], found[1][rows], TEMPERATURE)
        outputs.append(read.output.detach())
        if len(found) > 3:
            more = torch.autograd.grad(read.output, leaves, flowing[rows].double())
            gradients = [sum_ + part for sum_, part in zip(gradients, more)]
    expected = [torch.cat(outputs), *(gradients if len(found) > 3 else [])]
    pairs = zip([found[0], *found[3:]], expected)
    worst = max(((one.double() - other).norm() / other.norm()).item() for one, other in pairs)
    return [f"{agreed:.2%}", f"{worst:.1e}"]


class Benchmark:
    """All measurements of one process, printed as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "cpu" if options.toy else "cuda"
        self.type = torch.float32 if options.toy else torch.bfloat16
        self.clock = Clock(self.device, options.milliseconds)
        self.reads: list[list[str]] = []
        self.orders: list[list[str]] = []

    def run(self) -> None:
        print(self.head(), flush=True)
        for shape in self.options.shapes:
            if self.options.alternatives:
                self.tried(shape)
                continue
            for backward in (False, True):
                self.compared(shape, backward)
        if not self.options.alternatives:
            for entries, experts in ENTRIES[:1] if self.options.toy else ENTRIES:
                self.ordered(entries, experts)

    def tried(self, shape: tuple[int, ...]) -> None:
        """Every way to search, forward; and how long the search and the read of the chosen take by themselves."""
        parts, k = drawn(shape, self.device, self.type), shape[3]
        known = {"as planned": plan_for(*shape[:3], k, self.type)} | ALTERNATIVES
        for name, plan in known.items():
            line = self.attempt(lambda plan=plan: self.planned(parts, k, plan))
            self.add(self.reads, [",".join(map(str, shape)), "forward", name, *line])

    def planned(self, parts: list[Tensor], k: int, plan: Plan) -> list[str]:
        line = self.timed(lambda: list(launch.forward(*parts[:3], None, None, k, 1 / TEMPERATURE, plan)[:3]), parts, k)
        search = self.clock.quantiles(lambda: launch.searched(parts[0], parts[1], None, None, k, plan))[0]
        return [*line, f"search {search:.3f} ms"]

    def attempt(self, do: Callable[[], list]) -> list:
        """What `do` gives, or the text of what went wrong in its place."""
        try:
            return do()
        except Exception as error:  # noqa: BLE001 - a tile may be too large for a card; the text is the result
            return [" ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")]

    def timed(self, do: Callable[[], list[Tensor]], parts: list[Tensor], k: int) -> list[str]:
        """Median, quantiles, memory, and errors."""
        wrong = errors(do(), parts, k)
        peak = self.clock.peak(do)
        middle, low, high = self.clock.quantiles(do)
        return [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{peak / 1e6:.0f}", "", *wrong]

    def compared(self, shape: tuple[int, ...], backward: bool) -> None:
        """Ours, and each peer in turns with ours."""
        parts, k = drawn(shape, self.device, self.type), shape[3]
        start = [",".join(map(str, shape)), "forward + backward" if backward else "forward"]
        mine = work(ours, parts, k, backward)
        self.add(self.reads, [*start, "topk_read", *self.attempt(lambda: self.timed(mine, parts, k))])
        peers = {"eager": eager} | ({} if self.options.toy else {"torch.compile": torch.compile(eager, dynamic=False)})
        for name, peer in peers.items():

            def line(peer: Callable[..., Read] = peer) -> list[str]:
                its = work(peer, parts, k, backward)
                found = self.timed(its, parts, k)
                turns = [(self.clock.quantiles(its)[0], self.clock.quantiles(mine)[0]) for _ in range(2)]
                ratios = " and ".join(f"{their / our:.1f}" for their, our in turns)
                return [*found[:3], ratios, *found[4:]]

            self.add(self.reads, [*start, name, *self.attempt(line)])

    def ordered(self, entries: int, experts: int) -> None:
        """The counting sort beside `torch.sort`."""
        indices = torch.randint(0, experts, (entries,), device=self.device)
        forms = {"expert_order": "torch" if self.options.toy else "triton", "torch.sort": "torch"}
        medians = []
        for name, form in forms.items():
            middle, low, high = self.clock.quantiles(lambda form=form: expert_order(indices, experts, backend=form))
            medians.append(middle)
            ratio = f"{middle / medians[0]:.2f}" if len(medians) > 1 else ""
            line = [f"{entries:,}, {experts}", name, f"{middle:.4f}", f"{low:.4f} to {high:.4f}", ratio]
            self.add(self.orders, line)

    def add(self, rows: list[list[str]], line: list[str]) -> None:
        rows.append([str(part) for part in line])
        print(" | ".join(rows[-1]), flush=True)
        if self.options.markdown:
            tables = [markdown(head, made) for head, made in ((READS, self.reads), (ORDERS, self.orders)) if made]
            write(self.options.markdown, "\n\n".join([self.head() + ".", *tables]), "topk_memory")

    def head(self) -> str:
        return stamp(self.device, f"{self.type}, τ = {TEMPERATURE}", self.options.milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = shape_of("N,S,D,k")
    parser.add_argument("--shapes", nargs="+", type=shape, help=f"N,S,D,k …; default {' '.join(SHAPES)}")
    parser.add_argument("--alternatives", action="store_true", help="time every way to search and no peer")
    parser.add_argument("--milliseconds", type=float, default=100, help="of one measurement")
    parser.add_argument("--markdown", type=Path, help="page to write the tables into, between its marker lines")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, PyTorch form, CPU")
    options = parser.parse_args()
    options.shapes = options.shapes or [shape(text) for text in (TOY_SHAPES if options.toy else SHAPES)]
    if options.toy:
        torch.set_num_threads(1)
    Benchmark(options).run()


if __name__ == "__main__":
    main()
