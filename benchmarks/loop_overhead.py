"""What the platform's loop costs: training samples a second beside a bare loop, bare Lightning and Avalanche.

    python benchmarks/loop_overhead.py [--threads 1] [--repetitions 7] [--steps 1000] [--only mlp]

Every peer trains the same module on the same rows with plain SGD, one shuffled pass, in this one process. Building
a Trainer is part of the time for all who have one. Repetitions are interleaved, so that a machine that becomes
slower does so for everybody; ratios are medians over repetitions of the ratio within one, by the clock and by the
CPU time of the process, which tells more where others use the machine too. The rows are random, of MNIST's shape
for the MLP (784-400-400-10, batch 64) and 64 byte tokens for the Transformer (2 layers of 64, batch 16, a sixth of
the steps). "clplat" is a run as users have it, with its journal and an MLflow feed to a SQLite file.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from loop_workloads import RandomRows, Rows, Workload, workloads
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clplat.components import Component
from clplat.config import RunConfig, TrackingConfig, TrainingConfig, save
from clplat.fitting import fit
from clplat.interruption import Interruption
from clplat.journal import NAME, Journal
from clplat.loop import Run
from clplat.progress import Silent
from clplat.storage import read_json
from clplat.streams.base import Budget
from clplat.tracking import RUN_STATE, Feed

LEARNING_RATE = 0.01
Cost = tuple[float, float]
"""Wall-clock seconds, and CPU seconds of the whole process."""


class LossModule(LightningModule):
    """The least that Lightning needs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.module(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class Sliced:
    """Batches as slices of tensors in a random order: no collation."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int) -> None:
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size

    def __len__(self) -> int:
        return len(self.inputs) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.inputs)).split(self.batch_size):
            yield self.inputs[rows], self.targets[rows]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, targets.ndim - 1), targets.flatten())


def timed(work: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(workload: Workload, rows: Rows, scratch: Path) -> Cost:
    """A loop in five lines, without a framework."""
    module = workload.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def train() -> None:
        for inputs, targets in Sliced(*rows, workload.batch_size):
            optimizer.zero_grad()
            cross_entropy(module(inputs), targets).backward()
            optimizer.step()

    return timed(train)


def lightning_sliced(workload: Workload, rows: Rows, scratch: Path) -> Cost:
    """`Trainer.fit` with everything switched off that can be, over slices."""
    return _lightning(workload, Sliced(*rows, workload.batch_size))


def lightning_loader(workload: Workload, rows: Rows, scratch: Path) -> Cost:
    """The same over torch's DataLoader, which collates single rows."""
    return _lightning(workload, DataLoader(TensorDataset(*rows), batch_size=workload.batch_size, shuffle=True))


def _lightning(workload: Workload, loader: Sliced | DataLoader[tuple[Tensor, ...]]) -> Cost:
    module = LossModule(workload.module())
    return timed(lambda: Trainer(accelerator="cpu", max_epochs=1, barebones=True).fit(module, loader))


def avalanche_naive(workload: Workload, rows: Rows, scratch: Path) -> Cost:
    """Avalanche's `Naive` without loggers and metrics; training only."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils.data import AvalancheDataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    labels = DataAttribute([0] * len(rows[0]), "targets_task_labels", use_in_getitem=True)
    dataset = AvalancheDataset([TensorDataset(*rows)], data_attributes=[labels])
    experience = benchmark_from_datasets(train=[dataset]).train_stream[0]
    module = workload.module()
    strategy = Naive(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        criterion=cross_entropy,
        train_mb_size=workload.batch_size,
        evaluator=EvaluationPlugin(),
    )
    return timed(lambda: strategy.train(experience))


def clplat(workload: Workload, rows: Rows, scratch: Path) -> Cost:
    """A task of a run as users have it: journal on disk, MLflow fed in the background."""
    run = _run(workload, scratch, recorded=True)
    feed = Feed(run.folder, run.config.tracking)
    feed.start()
    _wait_for_start(run.folder)
    cost = _fit_cost(run, workload)
    feed.close("FINISHED")
    return cost


def clplat_unrecorded(workload: Workload, rows: Rows, scratch: Path) -> Cost:
    """The same without journal and MLflow: the difference is what logging costs."""
    return _fit_cost(_run(workload, scratch, recorded=False), workload)


def _fit_cost(run: Run, workload: Workload) -> Cost:
    cost = timed(lambda: fit(run, run.path[0]))
    if run.parts.learner.global_steps != workload.steps:
        raise RuntimeError(f"clplat took {run.parts.learner.global_steps} steps, the others {workload.steps}")
    return cost


def _wait_for_start(folder: Path) -> None:
    """Until MLflow has the run's parameters and tags: a longer run would not notice that beginning."""
    deadline = time.monotonic() + 60
    while (read_json(folder / RUN_STATE) or {"offset": -1})["offset"] < (folder / NAME).stat().st_size:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{folder}: the MLflow feed did not start within a minute")
        time.sleep(0.05)


def _run(workload: Workload, scratch: Path, *, recorded: bool) -> Run:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    config = RunConfig(
        study="loop-overhead",
        variant="naive",
        seed=0,
        stream=Component(
            class_path=f"{RandomRows.__module__}.{RandomRows.__name__}",
            init_args={"workload": workload.name, "steps": workload.steps},
        ),
        architecture=Component(class_path=workload.architecture.__name__, init_args=dict(workload.options)),
        training=TrainingConfig(
            batch_size=workload.batch_size,
            budget=Budget(epochs=1),
            optimizer=Component(class_path="torch.optim.SGD", init_args={"lr": LEARNING_RATE}),
            threads=torch.get_num_threads(),
            accelerator="cpu",
        ),
        tracking=TrackingConfig(uri=f"sqlite:///{scratch}/mlflow.db"),
    )
    save(config, folder / "config.yaml")
    journal = Journal(folder) if recorded else None
    run = Run(config, folder, journal=journal, interruption=Interruption(), progress=Silent())
    if journal is not None:
        journal.status("RUNNING")
        journal.flush()
    run.parts.context.task = run.path[0]
    return run


PEERS: dict[str, Callable[[Workload, Rows, Path], Cost]] = {
    "bare PyTorch loop": bare,
    "Lightning, sliced": lightning_sliced,
    "Lightning, DataLoader": lightning_loader,
    "Avalanche Naive": avalanche_naive,
    "clplat, no record": clplat_unrecorded,
    "clplat": clplat,
}


def measure(workload: Workload, repetitions: int, scratch: Path) -> dict[str, list[Cost]]:
    """What every peer takes in every repetition, after one that warms up and is not counted."""
    rows, names = workload.rows(), list(PEERS)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            cost = PEERS[name](workload, rows, scratch)
            if repetition:
                costs[name].append(cost)
    return costs


def report(workload: Workload, costs: dict[str, list[Cost]]) -> None:
    """One table, and the ratios that are goals."""
    print(
        f"\n{workload.name}: batch {workload.batch_size}, {workload.steps} steps, samples/s; speed / Lightning, sliced"
    )
    print(f"{'':24}{'median':>10}{'min':>10}{'max':>10}{'by clock':>12}{'by CPU time':>14}")
    for name, found in costs.items():
        rates = [workload.batch_size * workload.steps / wall for wall, _ in found]
        clock, cpu = speed_ratios(found, costs["Lightning, sliced"])
        print(f"{name:24}{statistics.median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}{clock:12.3f}{cpu:14.3f}")
    for peer, goal in (("Lightning, sliced", 0.95), ("Avalanche Naive", 1.15), ("clplat, no record", 0.98)):
        clock, cpu = speed_ratios(costs["clplat"], costs[peer])
        print(f"clplat / {peer}: {clock:.3f} by clock, {cpu:.3f} by CPU time (goal: at least {goal})")


def speed_ratios(ours: list[Cost], theirs: list[Cost]) -> Cost:
    """How many times as fast we are, by clock and by CPU time: medians over paired repetitions."""
    clock, cpu = zip(*((b[0] / a[0], b[1] / a[1]) for a, b in zip(ours, theirs, strict=True)), strict=True)
    return statistics.median(clock), statistics.median(cpu)


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every peer")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the MLP in one repetition")
    parser.add_argument("--only", choices=["mlp", "transformer"], help="one of the two models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"{processor()}, {os.cpu_count()} cores, {options.threads} thread(s), torch {torch.__version__}, "
          f"lightning {lightning.__version__}, Avalanche {version('avalanche-lib')}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for workload in workloads(options.steps).values():
            if options.only in (None, workload.name):
                report(workload, measure(workload, options.repetitions, Path(scratch)))


if __name__ == "__main__":
    main()
