"""What `mlp_memory` takes on a GPU: time, memory, error, ratios to plain PyTorch and titans-pytorch, and whole layers.

    python benchmarks/mlp_memory.py                                   # all shapes in bf16, peers, layers
    python benchmarks/mlp_memory.py --shapes 8,4096,8,64,16 --alternatives     # blocks, warps, stages; no peers
    python benchmarks/mlp_memory.py --shapes 8,4096,8,64,16 --profile          # milliseconds by kernel
    python benchmarks/mlp_memory.py --markdown docs/results/mlp_memory.md
    python benchmarks/mlp_memory.py --toy                             # the script itself, on a CPU, in seconds

A shape is B,T,H,D,C: rows, tokens, heads, their width (of values too) and tokens of a chunk; the memory is four times
as wide inside, with SiLU, residual, decay and momentum: TitansLMM's with `residual`. Times are of the device's events
with its cache emptied before each run; `forward` keeps nothing for a backward pass. Peers are the eager chunk loop, the
same with the chunk's body under torch.compile, both with TF32 products, and titans-pytorch, whose memory has GELU and
no residual, as ours then has beside it. Each is timed in turns with ours. "error" is the largest of ‖x − y‖ / ‖y‖ over
output, end state and gradients, against the chunked form in fp64 on the first row's first two heads; a peer above 2 %
is not timed.
Layers are a memory, its projections, a SwiGLU and both norms, in bf16 by autocast, forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_cases import worst
from kernel_profile import show
from memory_blocks import training_pass
from mlp_cases import Call, Case, reference, sliced, work

from clplat.architectures.associative_memory.presets import GatedDeltaNet, LayerKind, TitansLMM
from clplat.kernels.mlp_memory import Rule
from kernels import AGREES, Clock, markdown, shape_of, stamp, write

SHAPES = ["8,4096,8,64,16", "8,4096,8,64,32", "8,4096,8,64,64", "1,32768,8,64,16", "8,2048,8,128,64", "64,196,6,64,16"]
TOY_SHAPES = ["2,40,2,16,16"]
LINES = ["B,T,H,D,C", "pass", "form", "ms", "p20 to p80", "host ms", "peak MB", "its / ours", "error"]
LAYERS = ["layer", "B,T,H,D", "pass", "ms", "p20 to p80", "peak MB", "of GatedDeltaNet's"]


class Benchmark:
    """All measurements of one process, printed as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "cpu" if options.toy else "cuda"
        self.type, self.backend = (torch.float32, "torch") if options.toy else (torch.bfloat16, "triton")
        self.clock = Clock(self.device, options.milliseconds)
        self.lines: list[list[str]] = []
        self.layers: list[list[str]] = []

    def run(self) -> None:
        print(self.head(), flush=True)
        for shape in self.options.shapes:
            for backward in (False, True):
                if self.options.profile:
                    case = Case(shape)
                    title = f"{shape} {'forward + backward' if backward else 'forward'}"
                    show(title, work(case.ours(self.backend), case.drawn(self.device, self.type), backward))
                elif self.options.alternatives:
                    self.tried(shape, backward)
                else:
                    self.compared(shape, backward)
        if self.options.layers and not (self.options.alternatives or self.options.profile):
            self.whole_layers()

    def compared(self, shape: tuple[int, ...], backward: bool) -> None:
        """Ours, and each peer in turns with ours."""
        case, theirs = Case(shape), Case(shape, Rule(activation="gelu"))
        self.line(case, "mlp_memory", case.ours(self.backend), backward, None)
        if self.options.peers:
            self.line(case, "eager chunk loop", case.ours("torch"), backward, case.ours(self.backend))
            self.line(theirs, "titans-pytorch", theirs.titans, backward, theirs.ours(self.backend))
        if self.options.compiled:
            self.line(case, "torch.compile of the chunk", case.compiled, backward, case.ours(self.backend))

    def tried(self, shape: tuple[int, ...], backward: bool) -> None:
        """Every block of inner features, number of warps and stages, the same for all kernels; with either reading."""
        from clplat.kernels.mlp_memory import launch

        case, usual, usual_reads = Case(shape), launch.options, launch.reads_apart
        self.line(case, "as planned", case.ours(self.backend), backward, None)
        for block, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2)):

            def chosen(kernel, layout, block=block, warps=warps, stages=stages):
                found = usual(kernel, layout)
                changed = {"BJ": block, "num_warps": warps, "num_stages": stages}
                return found | changed if "BJ" in found and self.options.kernel in (None, kernel) else found

            launch.options = chosen
            name = f"blocks of {block}, {warps} warps, {stages} stages: {self.options.kernel or 'all'}"
            self.line(case, name, case.ours(self.backend), backward, None)
        launch.options = usual
        for apart in (False, True):
            launch.reads_apart = lambda layout, apart=apart: apart
            self.line(case, f"reads {'apart' if apart else 'in the walk'}", case.ours(self.backend), backward, None)
        launch.reads_apart = usual_reads

    def line(self, case: Case, name: str, call: Call | Callable[[], Call], backward: bool, mine: Call | None) -> None:
        """One form: what it takes, and beside ours, `mine`, by how much longer."""
        which = "forward + backward" if backward else "forward"
        try:
            its = call() if name in ("titans-pytorch", "torch.compile of the chunk") else call  # type: ignore[call-arg]
            found = self.timed(case, its, backward, mine)
        except Exception as error:  # noqa: BLE001 - forms fail in all ways, by memory above all; the text is the result
            found = [" ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")]
        self.lines.append([",".join(map(str, case.shape)), which, name, *found])
        print(" | ".join(self.lines[-1]), flush=True)
        self.page()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def timed(self, case: Case, call: Call, backward: bool, mine: Call | None) -> list[str]:
        given = case.drawn(self.device, self.type)
        its = work(call, given, backward)
        error, part = worst(sliced(its()), reference(case, given, backward))
        wrong = f"{error:.1e} ({part})"
        if mine is not None and error > AGREES:
            return ["", "", "", "", "differs", wrong]
        peak = self.clock.peak(its)
        middle, low, high = self.clock.quantiles(its)
        ratios = ""
        if mine is not None:
            ours = work(mine, given, backward)
            turns = [(self.clock.quantiles(its)[0], self.clock.quantiles(ours)[0]) for _ in range(2)]
            ratios = " and ".join(f"{their / our:.1f}" for their, our in turns)
        times = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{self.clock.host(its):.2f}"]
        return [*times, f"{peak / 1e6:.0f}", ratios, wrong]

    def whole_layers(self) -> None:
        """TitansLMM's layer in several chunks beside GatedDeltaNet's, at each shape of rows, tokens and heads once."""
        for B, T, H, D in dict.fromkeys(shape[:4] for shape in self.options.shapes):
            kinds: dict[str, LayerKind] = {"GatedDeltaNet, chunk 64": GatedDeltaNet(num_heads=H)}
            kinds |= {f"TitansLMM, chunk {C}": TitansLMM(num_heads=H, chunk=C) for C in (16, 32, 64)}
            first = None
            for name, kind in kinds.items():
                do = training_pass(kind, rows=B, length=T, hidden=H * D, device=self.device)
                do()
                middle, low, high = self.clock.quantiles(do)
                first = middle if first is None else first
                line = [name, f"{B},{T},{H},{D}", "forward + backward", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
                self.layers.append([*line, f"{self.clock.peak(do) / 1e6:.0f}", f"{middle / first:.2f}"])
                print(" | ".join(self.layers[-1]), flush=True)
                self.page()

    def page(self) -> None:
        if self.options.markdown:
            tables = [markdown(head, made) for head, made in ((LINES, self.lines), (LAYERS, self.layers)) if made]
            write(self.options.markdown, "\n\n".join([self.head() + ".", *tables]), "mlp_memory")

    def head(self) -> str:
        return stamp(self.device, f"{self.type}, backend {self.backend}", self.options.milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = shape_of("B,T,H,D,C")
    parser.add_argument("--shapes", nargs="+", type=shape, help=f"B,T,H,D,C …; default {' '.join(SHAPES)}")
    parser.add_argument("--alternatives", action="store_true", help="time other blocks and warps, and no peer")
    parser.add_argument("--profile", action="store_true", help="which kernels the time goes to, and nothing else")
    parser.add_argument("--kernel", choices=["walk", "read_back", "write_back"], help="of these alternatives, for one")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--layers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the chunk as a peer")
    parser.add_argument("--milliseconds", type=float, default=100, help="of one measurement")
    parser.add_argument("--markdown", type=Path, help="page to write the tables into, between its marker lines")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, PyTorch form, CPU")
    options = parser.parse_args()
    options.shapes = options.shapes or [shape(text) for text in (TOY_SHAPES if options.toy else SHAPES)]
    if options.toy:
        torch.set_num_threads(1)
    # The eager loop multiplies in fp32; TF32 is how one would run it.
    torch.set_float32_matmul_precision("high")
    Benchmark(options).run()


if __name__ == "__main__":
    main()
