"""What `delta_memory`'s kernels take on a GPU: time, memory, share of the hardware's floor, error, ratios to others.

    python benchmarks/kernels.py --markdown docs/results/kernels.md     # all cases and shapes, peers, in bf16
    python benchmarks/kernels.py --cases frozen --shapes 8,4096,16,128 --no-peers
    python benchmarks/kernels.py --toy                                  # the script itself, on a CPU, in seconds

Everything is run once before anything is timed; then all of our own measurements come, then libraries, whose first call
of an operation and shape may search for half a minute or more, then the eager loop and (with `--compiled`) its compiled
body. Beside every peer ours is timed again, in turns. A peer's ratio stands only where its outputs (and gradients)
agree with the fp64 reference on a slice of the batch: it may not do the same thing. `--seconds` starts nothing later.
Times are of the device's events with its cache emptied before each run and the launches under way; "host ms" is what
the call keeps the host busy. `forward` keeps nothing for a backward pass.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
from kernel_cases import FAMILY, Case, Outputs, drawn, floor_ms, input_bytes, ours, reference, sliced, work, worst
from kernel_peers import Peer, libraries, loops
from torch import Tensor

from clplat.kernels.delta_memory.reference import Inputs

SHAPES = ["8,4096,16,64", "8,4096,16,128", "1,32768,8,128", "32,512,8,64", "64,196,6,64"]
TOY_SHAPES = ["2,100,2,16", "1,64,2,16"]
AGREES = 2e-2
OURS = [
    "case",
    "B×T×H×D",
    "pass",
    "ms",
    "p20 to p80",
    "host ms",
    "peak MB",
    "× inputs + states",
    "floor ms",
    "of floor",
    "error",
]
PEERS = ["case", "B×T×H×D", "pass", "peer", "its ms", "our ms", "its / ours", "its peak MB", "its error"]
MARK = "<!-- written by benchmarks/{}.py: {} -->"


HEAD_START = 10_000_000
"""Cycles that the device spins before each measurement, some 5 ms: what the host needs to launch is not its time."""


class Clock:
    """Times work on a device, every repetition with an empty cache, within about so many milliseconds."""

    def __init__(self, device: str, milliseconds: float) -> None:
        self.device, self.milliseconds = device, milliseconds
        self.cache = torch.empty(2**28, dtype=torch.int8, device=device) if device == "cuda" else None

    def quantiles(self, do: Callable[[], object]) -> list[float]:
        """Milliseconds: median, 20 % and 80 %."""
        first = self._times(do, 1)[0]
        times = torch.tensor(self._times(do, int(min(max(self.milliseconds / first, 3), 200))))
        return times.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()

    def _times(self, do: Callable[[], object], count: int) -> list[float]:
        if self.cache is None:
            return [_wall(do) for _ in range(count)]
        marks = []
        for _ in range(count):
            self.cache.zero_()
            torch.cuda._sleep(HEAD_START)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            do()
            stop.record()
            marks.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in marks]

    def host(self, do: Callable[[], object]) -> float:
        """Milliseconds until a call returns to a host that has nothing else to wait for: the median of five."""
        found = []
        for _ in range(5):
            if self.cache is not None:
                torch.cuda.synchronize()
            found.append(_wall(do))
        return sorted(found)[2]

    def peak(self, do: Callable[[], object]) -> float:
        """Bytes that work needs beyond what is there before; 0 without a GPU."""
        if self.cache is None:
            return 0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        do()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}" if count else "–"


def _wall(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return 1e3 * (time.perf_counter() - start)


class Benchmark:
    """All measurements of one process, printed and kept as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.deadline = options, time.monotonic() + options.seconds
        self.device, self.backend = ("cpu", "torch") if options.toy else ("cuda", "triton")
        self.type = torch.float32 if options.toy else torch.bfloat16
        self.clock = Clock(self.device, options.milliseconds)
        self.cases = [
            Case(*member, shape) for member in FAMILY for shape in options.shapes if member[0] in options.cases
        ]
        self.expected: dict[tuple[Case, bool], Outputs] = {}
        self.ours: list[list[str]] = []
        self.peers: list[list[str]] = []
        self.left: list[str] = []

    def run(self) -> None:
        print(self.head(), flush=True)
        for case, backward in self.started("warm-up"):
            self.attempt(self.once, case, backward)
        self.table(self.ours, OURS, "own", lambda *what: [self.attempt(self.own, *what)])
        if self.options.peers:
            self.table(self.peers, PEERS, "libraries", lambda *what: self.beside(libraries(what[0]), *what))
            self.table(self.peers, PEERS, "eager loop", lambda *what: self.beside(loops(what[0], False), *what))
        if self.options.compiled:
            self.table(self.peers, PEERS, "compiled", lambda *what: self.beside(loops(what[0], True), *what))
        if self.left:
            print(f"not run, {self.options.seconds:g} s were over: {'; '.join(self.left)}", flush=True)

    def started(self, phase: str) -> Iterator[tuple[Case, bool]]:
        """The cases, forward and forward with backward, as long as there is time."""
        for case, backward in product(self.cases, [False, True] if self.options.backward else [False]):
            if time.monotonic() > self.deadline:
                self.left.append(f"{phase}: {case.name} {case.size}{' with backward' if backward else ''}")
                continue
            yield case, backward
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def table(
        self, rows: list[list[str]], head: list[str], phase: str, lines: Callable[[Case, bool], list[list[str]]]
    ) -> None:
        """Prints and keeps the lines of all cases of a phase; the page is written after each."""
        print(f"\n{phase}\n" + " | ".join(head), flush=True)
        for case, backward in self.started(phase):
            for line in lines(case, backward):
                rows.append([case.name, case.size, "forward + backward" if backward else "forward", *line])
                print(" | ".join(rows[-1]), flush=True)
                if self.options.markdown:
                    write(self.options.markdown, self.page())

    def attempt(self, do: Callable[..., list[str]], *what: object) -> list[str]:
        """What `do` gives, or the text of what went wrong in its place."""
        try:
            return do(*what)
        except Exception as error:  # noqa: BLE001 - kernels and libraries fail in all ways; the text is the result
            text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
            return [text if len(text) < 240 else text[:240] + " …"]

    def once(self, case: Case, backward: bool) -> list[str]:
        """Compiles, and compares with fp64."""
        inputs, upstream = drawn(case, self.device, self.type)
        found = sliced(work(ours(case, self.backend), inputs, upstream, backward)())
        error, name = worst(found, self.reference(case, backward, inputs, upstream))
        return [f"{error:.1e} ({name})"]

    def reference(self, case: Case, backward: bool, inputs: Inputs, upstream: Tensor) -> Outputs:
        """The slice in fp64, computed once."""
        if (case, backward) not in self.expected:
            self.expected[case, backward] = reference(case, inputs, upstream, backward)
        return self.expected[case, backward]

    def own(self, case: Case, backward: bool) -> list[str]:
        error = self.once(case, backward)
        do = work(ours(case, self.backend), *drawn(case, self.device, self.type), backward)
        peak = self.clock.peak(do)
        middle, low, high = self.clock.quantiles(do)
        element = torch.finfo(self.type).bits // 8
        floor, size = floor_ms(case, backward, element), input_bytes(case, element)
        times = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{self.clock.host(do):.2f}"]
        memory = [_megabytes(peak), f"{peak / size:.2f}" if peak else "–"]
        return [*times, *memory, f"{floor:.3f}", f"{floor / middle:.0%}", *error]

    def beside(self, peers: list[Peer], case: Case, backward: bool) -> list[list[str]]:
        """A line for each peer."""
        return [[peer.name, *self.attempt(self.pair, peer, case, backward)] for peer in peers]

    def pair(self, peer: Peer, case: Case, backward: bool) -> list[str]:
        """A peer and ours in turns, twice; if ours fails the peer's time stands alone, if it differs not even that."""
        inputs, upstream = drawn(case, self.device, self.type)
        its = work(peer.build(), peer.prepare(inputs), upstream, backward)
        found = {name: part for name, part in its().items() if name not in peer.other}
        error, name = worst(sliced(found), self.reference(case, backward, inputs, upstream))
        del found
        if error > AGREES:
            return ["", "", "differs", "", f"{error:.1e} ({name})"]
        rest = [_megabytes(self.clock.peak(its)), f"{error:.1e} ({name})"]
        mine = work(ours(case, self.backend), inputs, upstream, backward)
        try:
            mine()
        except Exception:  # noqa: BLE001 - ours has its own line, with the text
            return [f"{self.clock.quantiles(its)[0]:.3f}", "failed", "–", *rest]
        turns = [(self.clock.quantiles(mine)[0], self.clock.quantiles(its)[0]) for _ in range(2)]
        (our, their), ratios = (sum(side) / 2 for side in zip(*turns)), [b / a for a, b in turns]
        ratio = f"{their / our:.2f} ({' and '.join(f'{one:.2f}' for one in ratios)})"
        return [f"{their:.3f}", f"{our:.3f}", ratio, *rest]

    def head(self) -> str:
        peers = ", ".join(map(_version, ("fla-core", "titans-pytorch")))
        what = f"{peers}; Python {platform.python_version()}; {self.type}, backend {self.backend}, chunks of 64"
        return stamp(self.device, what, self.options.milliseconds)

    def page(self) -> str:
        tables = [markdown(head, rows) for head, rows in ((OURS, self.ours), (PEERS, self.peers)) if rows]
        left = [f"Not run, the time was over: {'; '.join(self.left)}."] if self.left else []
        return "\n\n".join([self.head() + ".", *tables, *left])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, text: str, script: str = "kernels") -> None:
    """Puts the text between the script's marker lines of a page, or at the end of one without them."""
    begin, end = (MARK.format(script, what) for what in ("begin", "end"))
    before, _, rest = (path.read_text() if path.exists() else "").partition(begin)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2] or chr(10)}")


def stamp(device: str, what: str, milliseconds: float) -> str:
    """Where and when a table was made: card, versions, `what` was timed, date, and how long each measurement was."""
    card = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    versions = ", ".join(map(_version, ("torch", "triton")))
    return f"{card}; {versions}; {what}; {datetime.date.today():%Y-%m-%d}; {milliseconds:g} ms a measurement"


def shape_of(letters: str) -> Callable[[str], tuple[int, ...]]:
    """The argument type of a problem's sizes, as "B,T,H,D"."""

    def shape(text: str) -> tuple[int, ...]:
        sizes = tuple(map(int, text.split(",")))
        if len(sizes) != len(letters.split(",")) or min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"a shape is {letters}, got {text!r}")
        return sizes

    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ["gdn", "hebb", "frozen", "exact"]
    parser.add_argument("--cases", nargs="+", choices=modes, default=modes)
    shape = shape_of("B,T,H,D")
    parser.add_argument("--shapes", nargs="+", type=shape, help=f"B,T,H,D …; default {' '.join(SHAPES)}")
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile of the chunk as a peer: up to 30 s a case"
    )
    parser.add_argument("--milliseconds", type=float, help="of one measurement, by default 100")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--markdown", type=Path, help="page to write the tables into, between its marker lines")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, PyTorch form, CPU")
    options = parser.parse_args()
    options.shapes = options.shapes or [shape(text) for text in (TOY_SHAPES if options.toy else SHAPES)]
    options.milliseconds = options.milliseconds or (2 if options.toy else 100)
    if options.toy:
        torch.set_num_threads(1)
    # The eager loop multiplies in fp32; TF32 is how one would run it.
    torch.set_float32_matmul_precision("high")
    Benchmark(options).run()


if __name__ == "__main__":
    main()
