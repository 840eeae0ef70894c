"""Two batches a task, everything else as in a real run: what it would take, before it is started."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clplat.config import RunConfig, StudyConfig
from clplat.errors import ConfigError
from clplat.fitting import fit, task_loader
from clplat.interruption import Interruption
from clplat.launch import worker_count
from clplat.loop import Run
from clplat.machine import cores
from clplat.progress import Silent
from clplat.streams.base import Budget, Task
from clplat.study import of_variant, preflight
from clplat.study_file import expand


def estimate(study: StudyConfig, console: Console) -> Table:
    """Time and memory of every variant, measured on two batches a task and one evaluation."""
    runs = expand(study)
    table = Table("variant", "tasks", "steps", "ms/step", "eval s", "minutes", "peak MiB", title="dry run")
    total, load = 0.0, os.getloadavg()[0]
    with console.status("checking"):
        preflight(runs)
    variants = list({run.variant: run for run in runs}.values())
    for number, run in enumerate(variants, start=1):
        trying = f"trying {run.variant} ({number} of {len(variants)})"
        if not console.is_terminal:
            console.print(trying)
        with console.status(trying), tempfile.TemporaryDirectory() as scratch:
            try:
                row = _try(run, Path(scratch))
            except ConfigError as error:
                raise ConfigError(f"{of_variant(run)}{error}") from error
        total += row[4] * len(study.seeds)
        table.add_row(
            run.variant, str(row[0]), str(row[1]), f"{row[2] * 1e3:.1f}", f"{row[3]:.2f}", f"{row[4] / 60:.1f}",
            f"{row[5] / 2**20:.0f}",
        )  # fmt: skip
    workers = worker_count(study, len(runs), max(run.training.devices for run in runs))
    table.caption = (
        f"{len(runs)} runs, {workers} side by side: about {total / workers / 60:.1f} minutes, plus start-up. "
        "Memory is this process's peak so far."
    )
    if load > 0.5:
        table.caption += (
            f" Measured while other work kept {load:.1f} of {cores()} cores busy: on an idle machine it takes less."
        )
    return table


class _Trial(Run):
    """A run whose tasks take one step each while it is `short`, those too whose budgets one arm is given (Joint)."""

    short = False

    def budget(self, task: Task) -> Budget:
        return Budget(steps=1) if self.short else super().budget(task)


def _try(config: RunConfig, folder: Path) -> tuple[int, int, float, float, float, int]:
    """Tasks, steps, seconds a step, seconds an evaluation, seconds in all, peak bytes."""
    quiet = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_seconds=1e9))
    run = _Trial(quiet, folder, journal=None, interruption=Interruption(), progress=Silent())
    evaluation = _evaluated(run, probes=True)
    between = evaluation if config.evaluation.probes == "always" else _evaluated(run, probes=False)
    steps, seconds = 0, 0.0
    for position, task in enumerate(run.path):
        run.parts.context.task, run.parts.context.past = task, run.path[:position]
        run.parts.learner.batches = 0
        run.parts.hooks.task_start(task)
        wanted = task_loader(run, task).stop // config.training.accumulate
        run.short = True
        fit(run, task)
        before, warm = run.costs.training_seconds, run.parts.learner.global_steps
        run.parts.learner.batches = 0
        fit(run, task)
        run.short = False
        steps += wanted
        # An arm that trains nothing takes none.
        taken = max(1, run.parts.learner.global_steps - warm)
        seconds += (run.costs.training_seconds - before) / taken * wanted
        start = time.perf_counter()
        run.parts.hooks.task_end(task)
        seconds += time.perf_counter() - start
    inside = len(run.path) - 1 + (steps // config.evaluation.every if config.evaluation.every else 0)
    run.costs.measure_memory()
    return (
        len(run.path),
        steps,
        seconds / max(1, steps),
        evaluation,
        seconds + 2 * evaluation + inside * between,
        run.costs.peak_memory_bytes,
    )


def _evaluated(run: Run, *, probes: bool) -> float:
    """Seconds of an evaluation. All tasks are seen, as at the end: classes not yet among the answers cost nothing."""
    start = time.perf_counter()
    run.parts.evaluator.cells([task.index for task in run.parts.stream.tasks], probes=probes)
    return time.perf_counter() - start
