"""Training on one task: the batches that are left, and what happens after each optimizer step."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clplat.loaders import RowOrder, TaskLoader
from clplat.observing import observe
from clplat.sharding import sharded
from clplat.streams.base import Data, Task
from clplat.streams.batch import Batch
from clplat.trainer import new_trainer

if TYPE_CHECKING:
    from clplat.loop import Run
    from clplat.loss_means import LossMeans


def fit(run: Run, task: Task) -> None:
    """Train until the task's budget is used, starting at the batch after the last finished one."""
    loader = task_loader(run, task)
    learner = run.parts.learner
    learner.full_rows = run.config.training.batch_size // run.world.size
    learner.watch = steps = TaskSteps(run, task, total=loader.stop // run.config.training.accumulate)
    if len(loader) and not steps.reached_before():
        learner.train()
        # With sharded weights the processes meet inside the model, and each has a Trainer of its own.
        together = run.world.size if run.config.training.sharding == "none" else 1
        with _quiet(), sharded(run):
            idle = learner.architecture.may_idle
            new_trainer(run.config.training, run.parts.device, together, idle).fit(learner, _AsOne(loader))
        learner.to(run.parts.device)  # several processes' Trainer leaves it on the CPU
        run.world.equalise(learner.architecture.buffers())
    else:
        steps.ended()  # stopped between the last step and the end: what it had not logged yet
    learner.watch = None
    learner.task_done()


def task_loader(run: Run, task: Task) -> TaskLoader:
    """The batches of a task that are still to come."""
    training, world, hooks = run.config.training, run.world, run.parts.hooks

    def order(data: Data, index: int) -> RowOrder:
        return RowOrder(
            len(data), batch_size=training.batch_size, seed=run.config.seed, task=index, rank=world.rank,
            size=world.size, ordered=getattr(data, "ordered", False),
        )  # fmt: skip

    data = hooks.train_data(task, run.parts.context.past)
    # Epochs and tokens are counted on each task's own rows: an arm that reads more data takes as many steps.
    total = sum(
        order(paid.train, paid.index).total_batches(run.budget(paid), paid.train.tokens_per_row, training.accumulate)
        for paid in hooks.budget_tasks(task)
    )
    learner = run.parts.learner
    learner.total_steps = total // training.accumulate
    if training.schedule_span == "stream":
        learner.total_steps *= len(run.path)
    return TaskLoader(
        data, order(data, task.index), start=learner.batches, stop=total, workers=training.workers,
        device=run.parts.device,
    )  # fmt: skip


class _AsOne:
    """All batches of a task as the one batch that Lightning sees."""

    def __init__(self, batches: TaskLoader) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        yield iter(self.batches)


class TaskSteps:
    """What the platform does between optimizer steps: log, score, observe, save, stop."""

    def __init__(self, run: Run, task: Task, *, total: int) -> None:
        self.run, self.task, self.total = run, task, total
        self.log_every = run.config.tracking.log_every
        self.evaluate_every = run.config.evaluation.every
        self.thresholds = run.budget(task).thresholds(task.headline)
        self._resumed_at = time.perf_counter()
        self._means: tuple[LossMeans, dict[str, float], int] | None = None

    def begun(self) -> None:
        """What came before, a new Trainer above all, is no training time."""
        self._resumed_at = time.perf_counter()

    def step_done(self) -> None:
        """Called once per optimizer step; cheap unless something is due."""
        run, learner = self.run, self.run.parts.learner
        step = learner.global_steps
        run.parts.context.step = step
        log = step % self.log_every == 0
        if log:
            self._log()
        if self.evaluate_every and step % self.evaluate_every == 0:
            self._score(step)
        self._observe_steps(step)
        if run.world.size == 1 or log:
            self._save_if_due()

    def ended(self) -> None:
        """The task's last, incomplete window of losses."""
        self._log()
        self._write()

    def _log(self) -> None:
        """Writes the last window of losses and sends for this one's: a GPU that is asked waits for no answer."""
        self._write()
        learner = self.run.parts.learner
        means, rate = learner.flush(self.run.world), learner.current_rate()
        if means is not None:
            done = learner.batches // self.run.config.training.accumulate
            self._means = (means, {} if rate is None else {"train/learning_rate": rate}, done)
        self._count_time()

    def _write(self) -> None:
        """Writes what was sent for, before anything is saved at the latest."""
        if self._means is None:
            return
        (means, rate, done), self._means = self._means, None
        values = means.read(self.run.parts.learner.architecture.not_finite)
        if self.run.journal is not None:
            self.run.journal.metrics(means.step, {f"train/{name}": value for name, value in values.items()} | rate)
        self.run.progress.step(self.task.name, done, self.total, values.get("loss"))

    def _count_time(self) -> None:
        """Move what was counted since the last time into the run's totals."""
        run, learner = self.run, self.run.parts.learner
        now = time.perf_counter()
        run.costs.training_seconds += now - self._resumed_at
        self._resumed_at = now
        rows, replayed = learner.rows["current"] * run.world.size, learner.rows["replay"] * run.world.size
        learner.rows = {"current": 0, "replay": 0}
        run.costs.rows_current += rows
        run.costs.rows_replay += replayed
        run.costs.steps = learner.global_steps
        run.costs.training_flops += 3 * run.parts.architecture.flops_per_row() * (rows + replayed)

    def _score(self, step: int) -> None:
        run = self.run
        self._count_time()
        seen = run.tasks_seen(self.task)
        with run.costs.timed("evaluation"), run.whole(run.parts.device):
            cells = run.parts.evaluator.cells(seen, probes=run.config.evaluation.probes == "always")
        run.forgetting = run.table.forgetting_by_task(cells)
        if run.journal is not None:
            run.journal.curve(step, self.task.index, cells)
        observe(run, "evaluation", run.parts.hooks.controllers)
        if self._reached(seen):
            run.parts.learner.trainer.should_stop = True
        self._resumed_at = time.perf_counter()

    def reached_before(self) -> bool:
        """Whether the task was over at the step from which a resumed run goes on: scored then, stopped, and saved."""
        learner = self.run.parts.learner
        if not self.evaluate_every or not learner.batches or learner.global_steps % self.evaluate_every:
            return False
        return self._reached(self.run.tasks_seen(self.task))

    def _reached(self, seen: list[int]) -> bool:
        if not self.thresholds:
            return False
        with self.run.costs.timed("evaluation"), self.run.whole(self.run.parts.device):
            return self.run.parts.evaluator.reached(self.task, self.thresholds, seen)

    def _observe_steps(self, step: int) -> None:
        due = self.run.parts.hooks.due(step)
        if due:
            self._count_time()
            observe(self.run, "step", due, loss=self.run.parts.learner.take_observed(self.run.world))
            self._resumed_at = time.perf_counter()

    def _save_if_due(self) -> None:
        run = self.run
        due, stop = run.agreed(run.checkpoints.due()), run.agreed(run.interruption.requested is not None)
        if stop or due:
            self._write()
        if stop:
            self._count_time()
            run.save("train")
            run.interruption.leave()
        if due:
            self._count_time()
            run.save("train")
            self._resumed_at = time.perf_counter()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on settings that are deliberate here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
