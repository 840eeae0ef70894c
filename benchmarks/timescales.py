"""The tables of docs/results/timescales.md, out of a study's journals alone, as Markdown.

    python benchmarks/timescales.py STUDY_FOLDER

Accuracy of every task after the last, with the best of an earlier task and the worst of all (what a gate looks at),
optimizer steps that a task took, and time constants after each task. Means over finished seeds, ± half of a 95 %
Student t interval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results_page import markdown

from clplat.config import load_run
from clplat.journal import last_status, read, table
from clplat.metrics import Interval, interval
from clplat.study_file import run_folders

CONSTANTS = {"model/tau_mean": "τ, mean of units", "model/tau_net_median": "τ_net, median of units"}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One run: accuracy (rows, tasks), the optimizer step of each row, and constants at those steps."""

    variant: str
    tasks: list[str]
    accuracy: np.ndarray
    steps: list[int]
    constants: dict[str, list[float]]


def finished(folder: Path) -> Finished:
    found, constants = table(folder), {name: [] for name in CONSTANTS}
    for entry in read(folder):
        if entry["kind"] == "metric":
            for name in CONSTANTS.keys() & entry["values"].keys():
                constants[name].append(float(entry["values"][name]))
    return Finished(
        variant=load_run(folder / "config.yaml").variant, tasks=found.tasks(), accuracy=found.matrix("accuracy"),
        steps=found.steps(), constants=constants,
    )  # fmt: skip


def of_seeds(runs: list[Finished], value: Callable[[Finished], float], show: str = "{:.1f}") -> str:
    found: Interval = interval([value(run) for run in runs])
    mean = show.format(found.mean)
    return mean if found.n < 2 else f"{mean} ± {show.format(found.half)}"


def accuracies(arms: dict[str, list[Finished]], tasks: list[str]) -> str:
    """Percent after the last task; the worst over seeds and tasks beside the mean, for a gate holds or does not."""
    rows = []
    for variant, runs in arms.items():
        last = [dict(zip(run.tasks, 100 * run.accuracy[-1], strict=True)) for run in runs]
        earlier = [value for scores in last for task, value in scores.items() if task != tasks[-1]]
        means = [
            f"{np.mean([scores[task] for scores in last]):.1f}" if all(task in scores for scores in last) else "–"
            for task in tasks
        ]
        extremes = [f"{max(earlier):.1f}" if earlier else "–", f"{min(min(scores.values()) for scores in last):.1f}"]
        rows.append([variant, str(len(runs)), *means, *extremes])
    return markdown(["variant", "seeds", *tasks, "best earlier", "worst"], rows)


def lengths(arms: dict[str, list[Finished]], tasks: list[str]) -> str:
    """Optimizer steps that each task took, and all of them."""
    rows = []
    for variant, runs in arms.items():
        own = [f"{np.mean([np.diff(run.steps)[place] for run in runs]):.0f}" for place in range(len(runs[0].tasks))]
        missing = ["–"] * (len(tasks) - len(own))
        rows.append([variant, *missing, *own, of_seeds(runs, lambda run: run.steps[-1], "{:.0f}")])
    return markdown(["variant", *tasks, "all"], rows)


def timescales(arms: dict[str, list[Finished]], name: str, tasks: list[str]) -> str:
    """A constant before training and after each task."""
    rows = []
    for variant, runs in arms.items():
        if not all(run.constants[name] for run in runs):
            continue
        count = len(runs[0].constants[name])
        means = [of_seeds(runs, lambda run, at=at: run.constants[name][at], "{:.2f}") for at in range(count)]
        rows.append([variant, means[0], *["–"] * (len(tasks) + 1 - count), *means[1:]])
    return markdown(["variant", "before", *tasks], rows)


def main(folder: Path) -> None:
    done = [finished(run) for run in run_folders(folder) if last_status(run) == "FINISHED"]
    if not done:
        sys.exit(f"{folder}: no finished run")
    arms = {
        variant: [run for run in done if run.variant == variant] for variant in dict.fromkeys(r.variant for r in done)
    }
    tasks = max((run.tasks for run in done), key=len)
    print(f"### Accuracy after the last task, %\n\n{accuracies(arms, tasks)}\n")
    print(f"### Optimizer steps a task took\n\n{lengths(arms, tasks)}\n")
    for name, said in CONSTANTS.items():
        print(f"### {said}, after each task\n\n{timescales(arms, name, tasks)}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/timescales.py STUDY_FOLDER")
    main(Path(sys.argv[1]))
