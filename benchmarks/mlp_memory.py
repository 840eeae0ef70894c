"""What `mlp_memory` takes on a GPU: time, memory, error, ratios to plain PyTorch and titans-pytorch, and whole layers.

    python benchmarks/mlp_memory.py                                   # all shapes in bf16, peers, layers
    python benchmarks/mlp_memory.py --shapes 8,4096,8,64,16 --alternatives     # blocks, warps, stages; no peers
    python benchmarks/mlp_memory.py --markdown docs/results/mlp_memory.md
    python benchmarks/mlp_memory.py --toy                             # the script itself, on a CPU, in seconds

A shape is B,T,H,D,C: rows, tokens, heads, their width (of values too) and tokens of a chunk; the memory is four times
as wide inside, with SiLU, residual, decay and momentum: TitansLMM's. Times are of the device's events with its cache
emptied before each run; `forward` keeps nothing for a backward pass. Peers are the eager chunk loop, the same with the
chunk's body under torch.compile, both with TF32 products, and titans-pytorch, whose memory has GELU and no residual, as
ours then has beside it. Each is timed in turns with ours. "error" is the largest of ‖x − y‖ / ‖y‖ over output, end
state and gradients, against the chunked form in fp64 on the first row's first two heads; a peer above 2 % is not timed.
Layers are a memory, its projections, a SwiGLU and both norms, in bf16 by autocast, forward and backward.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from kernel_cases import Outputs, worst
from kernel_peers import Columns
from torch import Tensor, nn

from clplat.architectures.associative_memory.presets import GatedDeltaNet, LayerKind, TitansLMM
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.decoder import Block
from clplat.architectures.layers import SwiGLU
from clplat.kernels.delta_memory.reference import Inputs, chunk_bounds
from clplat.kernels.mlp_memory import MLPState, Rule, mlp_memory
from clplat.kernels.mlp_memory.reference import chunk_step
from kernels import AGREES, Clock, markdown, write

SHAPES = ["8,4096,8,64,16", "8,4096,8,64,32", "8,4096,8,64,64", "1,32768,8,64,16", "8,2048,8,128,64", "64,196,6,64,16"]
TOY_SHAPES = ["2,40,2,16,16"]
LINES = ["B,T,H,D,C", "pass", "form", "ms", "p20 to p80", "host ms", "peak MB", "its / ours", "error"]
LAYERS = ["layer", "B,T,H,D", "pass", "ms", "p20 to p80", "peak MB", "of GatedDeltaNet's"]
PARTS = ("W1", "W2", "S1", "S2")
Call = Callable[[Inputs, MLPState], Outputs]


@dataclass(frozen=True)
class Case:
    """One memory at one shape."""

    shape: tuple[int, ...]
    rule: Rule = Rule(residual=True)

    def drawn(self, device: str, dtype: torch.dtype) -> tuple[Inputs, MLPState, Tensor]:
        """Inputs on which the memory is stable (unit keys, steps as TitansLMM bounds them), and the gradient of o."""
        generator = torch.Generator(device).manual_seed(0)
        B, T, H, D, C = self.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        q, k, v, upstream = (normal(B, T, H, D) for _ in range(4))
        log_decay, log_momentum = F.logsigmoid(normal(B, T, H) + 4), F.logsigmoid(normal(B, T, H) + 2)
        rate = normal(B, T, H).sigmoid() / C * -log_momentum.expm1()
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        # All rows and heads begin alike: titans-pytorch knows nothing else.
        W1, W2 = normal(D, 4 * D) / D**0.5, normal(4 * D, D) / (4 * D) ** 0.5
        W1, W2 = (part.expand(B, H, *part.shape).contiguous() for part in (W1, W2))
        state = MLPState(W1, W2, torch.zeros_like(W1), torch.zeros_like(W2))
        inputs = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), rate, log_decay, log_momentum)
        return inputs, state, upstream.to(dtype)

    def ours(self, backend: str) -> Call:
        """`mlp_memory` in one of its forms."""

        def call(inputs: Inputs, state: MLPState) -> Outputs:
            kind = {"activation": self.rule.activation, "residual": self.rule.residual}
            o, end = mlp_memory(*inputs, state=state, chunk=self.shape[4], backend=backend, **kind)  # type: ignore[arg-type]
            return {"o": o} | {name: getattr(end, name) for name in PARTS}

        return call

    def compiled(self) -> Call:
        """The chunked form with the body of its loop compiled."""
        torch.compiler.reset()
        step = torch.compile(chunk_step, dynamic=False)

        def call(inputs: Inputs, state: MLPState) -> Outputs:
            W, S, outputs = state.weights, state.momentum, []
            for start, stop in chunk_bounds(self.shape[1], self.shape[4], 0):
                o, W, S = step(inputs.tokens(start, stop), W, S, W, self.rule)
                outputs.append(o)
            return {"o": torch.cat(outputs, 1).to(inputs.v.dtype)} | dict(zip(PARTS, (*W, *(S or ()))))

        return call

    def titans(self) -> Call:
        """titans-pytorch's memory of two layers, without norms, with gates a token and gradients a chunk."""
        from titans_pytorch import NeuralMemory
        from titans_pytorch.memory_models import MemoryMLP

        B, T, H, D, C = self.shape
        memory = NeuralMemory(
            dim=D, chunk_size=1, batch_size=C, model=MemoryMLP(D, depth=2, expansion_factor=4.0), pre_rmsnorm=False,
            mem_model_norm_add_residual=False, adaptive_step_transform=lambda step: step,
            store_memory_loss_fn=lambda read, target: (read - target).square().sum(-1) / 2,
        )  # fmt: skip
        memory.to_queries, memory.to_keys, memory.to_values = (Columns(n * D, (n + 1) * D) for n in range(3))
        memory.to_adaptive_step = Columns(3 * D, 3 * D + 1, lambda part: part[..., 0])
        memory.to_momentum = Columns(3 * D + 1, 3 * D + 2, lambda part: part[None])
        memory.to_decay_factor = Columns(3 * D + 2, 3 * D + 3)

        def call(x: Inputs, state: MLPState) -> Outputs:
            memory.to(x.q.device)
            with torch.no_grad():
                for weight, first in zip(memory.memory_model_parameters, state.weights, strict=True):
                    weight.copy_(first[0, 0].expand_as(weight))
            # The library passes gates through sigmoids, and its decay is what is forgotten.
            gates = (x.rate, x.log_momentum.exp().logit(), -x.log_decay.exp().logit())
            parts = [part.float() for part in (x.q, x.k, x.v, *(gate[..., None] for gate in gates))]
            rows = torch.cat(parts, -1).transpose(1, 2).reshape(B * H, T, 3 * D + 3)
            return {"o": memory(rows)[0].reshape(B, H, T, D).transpose(1, 2)}

        return call


def work(call: Call, given: tuple[Inputs, MLPState, Tensor], backward: bool) -> Callable[[], Outputs]:
    """The forward pass alone, keeping nothing, or both, with gradients of all inputs and of the first weights."""
    inputs, state, upstream = given
    if not backward:
        return torch.no_grad()(lambda: call(inputs, state))
    leaves = {name: part.detach().requires_grad_() for name, part in inputs._asdict().items() if part is not None}
    first = {name: getattr(state, name).detach().requires_grad_() for name in ("W1", "W2")}

    def both() -> Outputs:
        outputs = call(inputs._replace(**leaves), state._replace(**first))
        everything = leaves | first
        found = torch.autograd.grad(outputs["o"], list(everything.values()), upstream, allow_unused=True)
        outputs = {name: part.detach() for name, part in outputs.items()}
        return outputs | {f"d{name}": part for name, part in zip(everything, found, strict=True) if part is not None}

    return both


def sliced(outputs: Outputs) -> Outputs:
    """The first row's first two heads, on the CPU: neither rows nor heads know each other, gradients included."""
    states = (*PARTS, "dW1", "dW2")
    return {name: (part[:1, :2] if name in states else part[:1, :, :2]).float().cpu() for name, part in outputs.items()}


def reference(case: Case, given: tuple[Inputs, MLPState, Tensor], backward: bool) -> Outputs:
    """The slice in fp64 by the chunked form."""
    inputs, state, upstream = given
    few = Inputs(*(None if part is None else part[:1, :, :2].double() for part in inputs))
    rows = MLPState(*(None if part is None else part[:1, :2].double() for part in state))  # type: ignore[arg-type]
    return sliced(work(case.ours("torch"), (few, rows, upstream[:1, :, :2].double()), backward)())


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
                self.tried(shape, backward) if self.options.alternatives else self.compared(shape, backward)
        if self.options.layers and not self.options.alternatives:
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
        for block, warps, stages in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3)):

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
                do = self.layer(kind, B, T, H * D)
                middle, low, high = self.clock.quantiles(do)
                first = middle if first is None else first
                line = [name, f"{B},{T},{H},{D}", "forward + backward", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
                self.layers.append([*line, f"{self.clock.peak(do) / 1e6:.0f}", f"{middle / first:.2f}"])
                print(" | ".join(self.layers[-1]), flush=True)
                self.page()

    def layer(self, kind: LayerKind, rows: int, length: int, hidden: int) -> Callable[[], object]:
        """A block of a MemoryTransformer, forward and backward."""
        torch.manual_seed(0)
        mlp = SwiGLU(hidden_size=hidden, inner_size=32 * -(-8 * hidden // 96))
        block = Block(hidden_size=hidden, attention=kind.build(hidden), mlp=mlp, dropout=0.0).to(self.device)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=hidden**-0.5)
        x = torch.randn(rows, length, hidden, device=self.device, requires_grad=True)
        reading = Reading(
            positions=torch.arange(length, device=self.device), mask=None, documents=None,
            lengths=torch.zeros(rows, dtype=torch.long, device=self.device),
        )  # fmt: skip
        leaves = [x, *block.parameters()]

        def both() -> object:
            with torch.autocast(self.device, torch.bfloat16):
                out = block(x, reading)[0]
            return torch.autograd.grad(out.float().square().mean(), leaves)

        both()
        return both

    def page(self) -> None:
        if self.options.markdown:
            tables = [markdown(head, made) for head, made in ((LINES, self.lines), (LAYERS, self.layers)) if made]
            write(self.options.markdown, "\n\n".join([self.head() + ".", *tables]), "mlp_memory")

    def head(self) -> str:
        card = platform.machine() if self.device == "cpu" else torch.cuda.get_device_name()
        return (
            f"{card}; torch {torch.__version__}, triton {triton.__version__}; {self.type}, backend {self.backend}; "
            f"{datetime.date.today():%Y-%m-%d}; {self.options.milliseconds:g} ms a measurement"
        )


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split(",")))
    if len(sizes) != 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a shape is B,T,H,D,C, got {text!r}")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape, help=f"B,T,H,D,C …; default {' '.join(SHAPES)}")
    parser.add_argument("--alternatives", action="store_true", help="time other blocks and warps, and no peer")
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
