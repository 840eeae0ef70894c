"""One experiment in clplat, in Avalanche's own loop, and in a bare loop: accuracies, losses and seconds of each.

Every side reads the same stream, builds the same MLP with the same initial weights and makes the same evaluations.
Avalanche and the bare loop get the images as ready tensors: Avalanche's transforms image by image would only slow it
down. The clock runs from before the data are read until the last score; what is imported is imported before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from avalanche_pairs import BATCH, LEARNING_RATE, PAIRS, Experiment
from torch import Tensor, nn

from clplat.assembly import assemble, built_architecture, prepared_stream
from clplat.config import RunConfig, save
from clplat.loaders import RowOrder
from clplat.strategies.avalanche_shim import unshared
from clplat.strategies.projection import AGEM
from clplat.strategies.world import World
from clplat.streams.base import Data, Stream, Task
from clplat.streams.batch import Batch

EVAL_BATCH = 256
Found = dict[str, Any]
"""`accuracy` (mean over tasks after the last), `seconds` until the last score, and `losses`, one for each step."""


def clplat(experiment: Experiment, seed: int, scratch: Path) -> Found:
    """A run as users have it: journal and checkpoints, and where it is timed also MLflow, fed in the background."""
    import lightning  # noqa: F401 - imported before the clock starts, as the run would do after
    import mlflow  # noqa: F401

    import clplat.loop  # noqa: F401
    from clplat.execution import execute
    from clplat.journal import read, table

    timed = experiment.timed
    run = experiment.config(seed, scratch, recorded=timed, log_every=20 if timed else 1)
    folder = scratch / f"run-{experiment.benchmark}-{experiment.pair}-{time.time_ns()}"
    folder.mkdir()
    save(run, folder / "config.yaml")
    start, clock = time.time(), time.perf_counter()
    outcome = execute(folder)
    whole = time.perf_counter() - clock
    if outcome.status != "FINISHED":
        raise RuntimeError(f"clplat: {outcome.reason}")
    entries = list(read(folder))
    losses = [_all_terms(entry["values"]) for entry in entries if "train/loss" in entry.get("values", {})]
    last = max(entry["t"] for entry in entries if entry["kind"] == "results") / 1000
    scores = table(folder).scores()[-1]
    return {"accuracy": float(scores.mean()), "seconds": last - start, "recorded": whole, "losses": losses}


def _all_terms(values: dict[str, float]) -> float:
    return sum(v for name, v in values.items() if name == "train/loss" or name.startswith("train/penalty"))


class OurRows:
    """The batches that our run trains on and the rows that it draws, made again without training.

    Both depend on data and seed alone, never on the weights.
    """

    def __init__(self, run: RunConfig, stream: Stream, remembers: bool) -> None:
        self.parts, self.run, self.remembers = assemble(run, World(), stream), run, remembers

    def batches(self, task: Task) -> Iterator[list[Tensor]]:
        """The batches of a task as Avalanche wants them; the next one is made when it is asked for."""
        hooks, context = self.parts.hooks, self.parts.context
        context.task, context.past = task, self.parts.stream.tasks[: task.index]
        if not self.remembers:
            yield from (_as_theirs(batch) for batch in self._own(task.train, task))
            return
        hooks.task_start(task)
        for batch in self._own(hooks.train_data(task, context.past), task):
            yield _as_theirs(hooks.batch(batch))
            for strategy in hooks.with_step_end:
                strategy.fresh.clear()
        hooks.task_end(task)

    def _own(self, data: Data, task: Task) -> Iterator[Batch]:
        order = RowOrder(len(data), batch_size=BATCH, seed=self.run.seed, task=task.index)
        steps = order.total_batches(self.run.training.budget, 1, 1)
        return (data.batch(rows) for rows in order.batches(0, steps))

    def drawn(self) -> Iterator[list[Tensor]]:
        """What A-GEM draws from its memory, step by step."""
        agem = self.parts.hooks.strategies["it"]
        assert isinstance(agem, AGEM)
        while True:
            yield _as_theirs(agem.memory.draw(agem.sample_size))


def _as_theirs(batch: Batch) -> list[Tensor]:
    return [batch.inputs, batch.targets, torch.zeros_like(batch.targets)]


class Beside:
    """A plugin of Avalanche that notes every step's loss, penalties included, and hands over `rows`."""

    def __init__(self, tasks: Sequence[Task], rows: OurRows | None) -> None:
        self.tasks, self.rows, self.losses = tasks, rows, list[Tensor]()

    def before_training_epoch(self, strategy: Any, **_: Any) -> None:
        if self.rows is None:
            return
        task = self.tasks[strategy.clock.train_exp_counter]
        strategy.dataloader = self.rows.batches(task)
        for plugin in strategy.plugins:
            if hasattr(plugin, "buffer_dliter"):
                plugin.buffer_dliter = self.rows.drawn()

    def before_forward(self, strategy: Any, **_: Any) -> None:
        """On a CPU Avalanche's SI keeps views of the weights, which then never seem to move: it gets copies."""
        for plugin in strategy.plugins:
            unshared(plugin)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.losses.append(strategy.loss.detach())


def whole(data: Data) -> tuple[Tensor, Tensor]:
    """All rows of a set."""
    batch = data.batch(torch.arange(len(data)))
    return batch.inputs, batch.targets


def avalanche(experiment: Experiment, seed: int, scratch: Path) -> Found:
    """Avalanche's strategy in Avalanche's loop: its loaders, its evaluation plugin, no loggers."""
    from clplat.strategies.avalanche_shim import PlainModel, avalanche_dataset
    from clplat.streams.avalanche_stream import quiet

    with quiet():
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin

    pair, run = PAIRS[experiment.pair], experiment.config(seed, scratch, recorded=False, log_every=20)
    start = time.perf_counter()
    stream = prepared_stream(run)
    rows = OurRows(run, stream, pair.remembers) if experiment.same_rows else None
    model, beside = PlainModel(built_architecture(run, stream)), Beside(stream.tasks, rows)
    with quiet():
        benchmark = benchmark_from_datasets(
            train=[avalanche_dataset(*whole(task.train)) for task in stream.tasks],
            test=[avalanche_dataset(*whole(task.test.data)) for task in stream.tasks],
        )
        strategy = getattr(supervised, pair.theirs)(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH, eval_mb_size=EVAL_BATCH,
            train_epochs=1 if rows else experiment.passes(), plugins=[beside],
            evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]), **pair.arguments,
        )  # fmt: skip
        torch.manual_seed(seed)
        scores: dict[str, float] = {}
        for number, tests in enumerate(evaluations(experiment, stream)):
            if number:
                strategy.train(benchmark.train_stream[number - 1], num_workers=0)
            if tests:
                scores = strategy.eval(benchmark.test_stream[: len(tests)], num_workers=0)
    return {
        "accuracy": _mean_accuracy(scores, len(stream.tasks)),
        "seconds": time.perf_counter() - start,
        "losses": [float(value) for value in beside.losses],
    }


def _mean_accuracy(scores: dict[str, float], tasks: int) -> float:
    found = [value for name, value in scores.items() if name.startswith("Top1_Acc_Exp")]
    if len(found) != tasks:
        raise RuntimeError(f"Avalanche gave {len(found)} accuracies for {tasks} tasks: {sorted(scores)}")
    return statistics.mean(found)


def evaluations(experiment: Experiment, stream: Stream) -> list[Sequence[Task]]:
    """The tasks that are scored before the first task, after it, and so on: those that clplat scores.

    Where each class has an output of its own, a task whose classes have not been seen is not scored.
    """
    tasks = list(stream.tasks)
    if not experiment.timed:
        return [*([] for _ in tasks), tasks]
    if stream.spec.scenario == "class":
        return [tasks[:number] for number in range(len(tasks) + 1)]
    return [tasks] * (len(tasks) + 1)


def bare(experiment: Experiment, seed: int, scratch: Path) -> Found:
    """No framework: naive training on shuffled slices of tensors in five lines."""
    run = experiment.config(seed, scratch, recorded=False, log_every=20)
    start = time.perf_counter()
    stream = prepared_stream(run)
    model = built_architecture(run, stream)
    tests = {task.index: whole(task.test.data) for task in stream.tasks}
    optimizer, scores = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), [0.0]
    for number, scored in enumerate(evaluations(experiment, stream)):
        if number:
            inputs, targets = whole(stream.tasks[number - 1].train)
            for rows in torch.randperm(len(targets)).split(BATCH):
                batch = Batch(inputs=inputs.index_select(0, rows), targets=targets[rows])
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch).logits, batch.targets).backward()
                optimizer.step()
        scores = [_accuracy(model, *tests[task.index]) for task in scored]
    return {"accuracy": statistics.mean(scores), "seconds": time.perf_counter() - start, "losses": []}


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    right = 0
    for part, labels in zip(inputs.split(EVAL_BATCH), targets.split(EVAL_BATCH)):
        right += int((model(Batch(inputs=part, targets=labels)).logits.argmax(1) == labels).sum())
    return right / len(targets)


SIDES: dict[str, Callable[[Experiment, int, Path], Found]] = {"clplat": clplat, "avalanche": avalanche, "bare": bare}
