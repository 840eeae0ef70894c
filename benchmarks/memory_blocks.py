"""Training tokens a second of whole blocks: a memory layer and a SwiGLU behind it, with norms and residuals.

    python benchmarks/memory_blocks.py                                   # on a GPU: all layers, 4 to 32 rows
    python benchmarks/memory_blocks.py --rows 8 --only Hope              # some of them
    python benchmarks/memory_blocks.py --rows 8 --only "depth 1" --profile          # milliseconds by kernel
    python benchmarks/memory_blocks.py --rows 8 --only "depth 1" --warps 4 8 16     # of all of Hope's kernels
    python benchmarks/memory_blocks.py --rows 8 --only "depth 1" --warps planned write_back=4 walk=16   # of one
    python benchmarks/memory_blocks.py --rows 8 --only "depth 2" --compiled
    python benchmarks/memory_blocks.py --device cpu --tokens 128 --hidden 32 --heads 2 --rows 1 --milliseconds 1

A pass is forward and backward, in bf16 by autocast on a GPU and in fp32 on a CPU, with the gradients of the stream and
of all weights. Times are of the device's events, medians, with the cache emptied before each; "of GatedDeltaNet" is the
time beside that of the GatedDeltaNet block of as many rows in the same process. Peak memory is what a pass needs beyond
weights and stream. A case that fails, by memory above all, says so, and the next one begins. `--seconds` begins none
later; the cases with most rows come last.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from kernel_profile import show
from torch import nn

from clplat.architectures.associative_memory.presets import GatedDeltaNet, LayerKind, TitansLMM
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.decoder import Block
from clplat.architectures.hope.presets import SelfModifyingTitans
from clplat.architectures.layers import SwiGLU
from kernels import Clock, stamp

FIRST = "GatedDeltaNet, chunk 64"


def layers(heads: int) -> dict[str, LayerKind]:
    """What is measured, by name."""
    kinds: dict[str, LayerKind] = {FIRST: GatedDeltaNet(num_heads=heads)}
    kinds |= {f"TitansLMM, a matrix, chunk {C}": TitansLMM(num_heads=heads, chunk=C, depth=1) for C in (64, 16)}
    kinds |= {f"TitansLMM, chunk {C}": TitansLMM(num_heads=heads, chunk=C) for C in (64, 32, 16)}
    for depth in (1, 2):
        for momentum in (True, False) if depth == 1 else (True,):
            for C in (64, 16, 32) if depth == 1 else (64, 16, 256):
                name = f"Hope, depth {depth}, chunk {C}" + ", no momentum" * (not momentum)
                kinds[name] = hope(heads, C, depth=depth, momentum=momentum)
    kinds |= {f"Hope, depth 2, chunk {C}, compiled": hope(heads, C, compiled=True) for C in (64, 256)}
    return kinds


def hope(heads: int, chunk: int, *, depth: int = 2, momentum: bool = True, compiled: bool = False) -> LayerKind:
    """All five memories in one chunk."""
    return SelfModifyingTitans(
        num_heads=heads, depth=depth, chunk=chunk, generator_chunk=chunk, momentum=momentum, compiled=compiled
    )


def training_pass(kind: LayerKind, *, rows: int, length: int, hidden: int, device: str) -> Callable[[], object]:
    """Forward and backward of a block of a MemoryTransformer."""
    torch.manual_seed(0)
    mlp = SwiGLU(hidden_size=hidden, inner_size=32 * -(-8 * hidden // 96))
    block = Block(hidden_size=hidden, attention=kind.build(hidden), mlp=mlp, dropout=0.0).to(device)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=hidden**-0.5)
    x = torch.randn(rows, length, hidden, device=device, requires_grad=True)
    reading = Reading(
        positions=torch.arange(length, device=device), mask=None, documents=None,
        lengths=torch.zeros(rows, dtype=torch.long, device=device),
    )  # fmt: skip
    leaves = [x, *block.parameters()]

    def both() -> object:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = block(x, reading)[0]
        return torch.autograd.grad(out.float().square().mean(), leaves)

    return both


class Benchmark:
    """All measurements of one process, printed as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.deadline = options, time.monotonic() + options.seconds
        self.clock = Clock(options.device, options.milliseconds)
        self.first: dict[int, float] = {}

    def run(self) -> None:
        print(self.head(), flush=True)
        print("layer | rows | warps | ms | p20 to p80 | host ms | tokens/s | peak MB | of GatedDeltaNet", flush=True)
        kinds = layers(self.options.heads)
        chosen = {name: kind for name, kind in kinds.items() if self.options.only in name or name == FIRST}
        if not self.options.compiled:
            chosen = {name: kind for name, kind in chosen.items() if "compiled" not in name}
        for rows in self.options.rows:
            for name, kind in chosen.items():
                for warps in self.options.warps if name.startswith("Hope, depth 1") else [None]:
                    if time.monotonic() > self.deadline:
                        print(f"{name} | {rows} | not begun, {self.options.seconds:g} s were over", flush=True)
                        continue
                    self.attempt(name, kind, rows, warps)

    def attempt(self, name: str, kind: LayerKind, rows: int, warps: str | None) -> None:
        """One layer, and what came of it."""
        line = [name, str(rows), warps or "planned"]
        try:
            with_warps(warps)
            line += self.measured(name, kind, rows)
        except Exception as error:  # noqa: BLE001 - layers fail in all ways, by memory above all; the text is the result
            line.append(" ".join(f"{type(error).__name__}: {error}".split())[:160].replace("|", "/"))
        print(" | ".join(line), flush=True)
        # Another case is another graph, of which one function may have eight.
        torch.compiler.reset()
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    def measured(self, name: str, kind: LayerKind, rows: int) -> list[str]:
        sizes = {"rows": rows, "length": self.options.tokens, "hidden": self.options.hidden}
        do = training_pass(kind, device=self.options.device, **sizes)
        do()
        if self.options.profile:
            show(f"{name}, {rows} rows", do)
        middle, low, high = self.clock.quantiles(do)
        if name == FIRST:
            self.first[rows] = middle
        ratio = f"{middle / self.first[rows]:.2f}" if rows in self.first else ""
        each = 1e3 * rows * self.options.tokens / middle
        times = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{self.clock.host(do):.2f}", f"{each:.0f}"]
        return [*times, f"{self.clock.peak(do) / 1e6:.0f}", ratio]

    def head(self) -> str:
        asked = self.options
        what = f"{asked.tokens} tokens, hidden size {asked.hidden}, {asked.heads} heads"
        return stamp(asked.device, what, asked.milliseconds)


def with_warps(warps: str | None) -> None:
    """So many in all kernels of Hope's memories, or `kernel=warps` in one; None or `planned`: as `tuning` has it."""
    from clplat.kernels.self_modifying import launch, tuning

    one, _, count = (warps or "planned").rpartition("=")

    def chosen(kernel: str, layout: object) -> dict[str, int]:
        found = tuning.options(kernel, layout)  # type: ignore[arg-type]
        return found | {"num_warps": int(count)} if count != "planned" and one in ("", kernel) else found

    launch.options = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: without a GPU")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 4, 32])
    parser.add_argument("--only", default="", help="layers with this in their names, and GatedDeltaNet")
    parser.add_argument(
        "--warps", nargs="+", default=[None], metavar="[KERNEL=]N", help="of the kernels of Hope at depth 1; `planned`"
    )
    parser.add_argument("--compiled", action="store_true", help="chunks without kernels under torch.compile, too")
    parser.add_argument("--profile", action="store_true", help="which kernels the time goes to, too")
    parser.add_argument("--milliseconds", type=float, default=100, help="of one measurement")
    parser.add_argument("--seconds", type=float, default=120, help="after which no case begins")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no GPU, on which blocks are timed; to time small ones on this machine: --device cpu --tokens 128 "
            "--hidden 32 --heads 2 --rows 1 --milliseconds 1"
        )
    if options.device == "cpu":
        torch.set_num_threads(1)
    # What has no kernel multiplies in fp32; TF32 is how one would run it.
    torch.set_float32_matmul_precision("high")
    Benchmark(options).run()


if __name__ == "__main__":
    main()
