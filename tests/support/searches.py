"""Searches without training: a run is a formula of its configuration, written down as a real run would be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from records import cells
from rich.console import Console
from studies import REPLAY, run_folder, study

from clplat.config import RunConfig, load_run
from clplat.errors import Interrupted, Pruned
from clplat.execution import Outcome
from clplat.journal import Journal
from clplat.launchers import local
from clplat.progress import Progress
from clplat.supply import Listed
from clplat.tuning import trials
from clplat.tuning import tune as tune_module
from clplat.tuning.checks import load_tune
from clplat.tuning.outcome import Tuned
from clplat.tuning.tune import resume_tune, run_tune

LR, RATIO, CAPACITY = (
    "training.optimizer.init_args.lr", "strategies.replay.init_args.ratio", "strategies.replay.init_args.capacity",
)  # fmt: skip
SPACE = {
    LR: {"low": 1e-3, "high": 1.0, "log": True},
    RATIO: {"low": 0.25, "high": 2.0},
    CAPACITY: {"low": 10, "high": 90},
}
Formula = Callable[[RunConfig, int], float]
"""The score of every task so far after training through so many."""


def tune_study(**changes: Any) -> dict[str, Any]:
    """A search of replay and learning rate on three tasks of digits, tuned on two."""
    data = study(
        strategies={"replay": copy.deepcopy(REPLAY)}, space=copy.deepcopy(SPACE), seeds=[0, 1],
        launcher={"workers": 1}, tune={"trials": 4},
    )  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        place = data
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return data


def quiet() -> Console:
    return Console(quiet=True)


def tune(**changes: Any) -> Tuned:
    """Begin a search."""
    return run_tune(load_tune(tune_study(**changes)), quiet())


def go_on(folder: Path, *overrides: tuple[str, str]) -> Tuned:
    """Resume one."""
    return resume_tune(folder, list(overrides), quiet())


def folder_here() -> Path:
    """The folder of the one tune in the current folder."""
    return next(Path("runs").glob("*-tune-*"))


def settings(config: RunConfig) -> tuple[float, float, int]:
    """Learning rate, ratio and capacity of a run."""
    replay = config.strategies["replay"].init_args
    return config.training.optimizer.init_args["lr"], replay["ratio"], replay["capacity"]


class Formulas:
    """Stands in for running: which folders were run, in what order, and what else should happen to a run."""

    def __init__(self, formula: Formula) -> None:
        self.formula, self.ran = formula, list[str]()
        self.instead: dict[str, Any] = {}
        """By folder name what becomes of its next run: an exception, or an outcome's status and cause."""

    def __call__(self, folder: Path, progress: Progress) -> Outcome:
        self.ran.append(folder.name)
        todo = self.instead.pop(folder.name, None)
        if isinstance(todo, BaseException):
            raise todo
        if todo is not None:
            status, cause = todo
            return self._ended(folder, Outcome(folder=folder, status=status, cause=cause, reason="as planned", code=1))
        try:
            self._rows(folder, progress)
        except Pruned as end:
            return self._ended(folder, Outcome(folder=folder, status="PRUNED", reason=str(end)))
        return self._ended(folder, Outcome(folder=folder, status="FINISHED"))

    def _rows(self, folder: Path, progress: Progress) -> None:
        config = load_run(folder / "config.yaml")
        tasks = [f"task{number}" for number in range(config.tasks or 3)]
        for row in range(len(tasks) + 1):
            journal = Journal(folder)
            score = self.formula(config, row) if row else 0.0
            journal.results(row, 10 * row, cells([score] * len(tasks), tasks))
            journal.metrics(10 * row, {"cost/training_flops": row * 1e6 * settings(config)[1]})
            journal.flush()
            progress.boundary(row, {})

    def _ended(self, folder: Path, outcome: Outcome) -> Outcome:
        journal = Journal(folder)
        journal.status(outcome.status, outcome.reason)
        journal.flush()
        return outcome


@contextmanager
def formulas(formula: Formula, *, pages: bool = False) -> Iterator[Formulas]:
    """While inside, runs are this formula; reports are drawn where `pages` are asked for."""
    found = Formulas(formula)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "execute_safely", found)
        patch.setattr(trials, "_open", partial(_open_unsafely, trials._open))
        # Drawing takes longer than all else; pages have tests of their own.
        for name in () if pages else ("conclude", "write_page"):
            patch.setattr(tune_module, name, lambda *_: None)
        yield found


def _open_unsafely(original: Any, *arguments: Any) -> Any:
    """A database that does not wait for the disk: nobody pulls the plug in a test."""
    from sqlalchemy import event

    storage, found = original(*arguments)
    event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    storage.engine.dispose()
    return storage, found


def stopped() -> Interrupted:
    """What ends a process that was asked to stop between two runs."""
    return Interrupted("SIGTERM")


class TwoThatAsk(Listed):
    """Two runs, `first` and `second`, that ask at each boundary; the first is told to end behind its second task."""

    asks = True

    def __init__(self, folder: Path) -> None:
        super().__init__([run_folder(folder, study(), name) for name in ("first", "second")])
        self.asked: list[tuple[str, int]] = []

    def boundary(self, folder: Path, row: int) -> str:
        self.asked.append((folder.name, row))
        return "enough" if (folder.name, row) == ("first", 2) else ""

    def assert_heard(self) -> None:
        """Both have asked at all their boundaries, and ended as they were told."""
        outcomes = [(o.status, o.reason, o.code) for o in self.outcomes(0)]
        assert outcomes == [("PRUNED", "enough", 0), ("FINISHED", "", 0)]
        assert sorted(self.asked) == [("first", n) for n in range(3)] + [("second", n) for n in range(4)]
