"""The supply of a search's runs: asks for trials, lays out their folders, ends the hopeless, tells how they ended."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clplat.config import StudyConfig, plain, save
from clplat.errors import ClplatError, ConfigError
from clplat.execution import Outcome
from clplat.journal import ENDED, NAME, Journal, last_status, read, record_lost
from clplat.lease import is_busy
from clplat.plan import NAME as PLAN
from clplat.plan import read_plan
from clplat.storage import write_json, writing
from clplat.study import lay_out_runs
from clplat.study_file import expand, load_study
from clplat.study_results import measured
from clplat.tuning.protocol import Protocol
from clplat.tuning.pruning import FIRST_BOUNDARY, worse_than_most
from clplat.tuning.trials import Trial, Trials, storage_errors
from clplat.tuning.words import named, number


class Search:
    """Gives the launcher one run after another (`supply.Supply`); each trial has a run for every tuning seed."""

    asks = True

    def __init__(
        self, folder: Path, study: StudyConfig, protocol: Protocol, trials: Trials, say: Callable[[str], None]
    ) -> None:
        self.folder, self.protocol, self.trials, self._say = folder, protocol, trials, say
        self.tune = study.tune
        self._waits = study.launcher.kind == "local"
        self.trouble = ""
        """Why no more trials can be begun, though there should be; empty while nothing is wrong."""
        self._owners: dict[Path, Trial] = {}
        self._folders: dict[int, list[Path]] = {}
        self._variants = dict(load_study(folder / "study.yaml").variants)
        self._waiting: list[Path] = []
        self._tasks = len(protocol.streams[0]["order"])
        self._deadline = math.inf if study.tune.timeout is None else time.monotonic() + study.tune.timeout

    def resume(self) -> None:
        """Take up the trials that this folder has begun; what has finished is told, the rest goes on."""
        with self._trouble_said():
            for trial in self.trials.mine(alone=self.tune.storage is None):
                self._begin(trial)

    def take(self) -> Path | None:
        while not self.trouble:
            if self._waiting:
                return self._waiting.pop(0)
            if self._folders and time.monotonic() >= self._deadline:
                return None
            with self._trouble_said():
                trial = self.trials.ask()
                if trial is None:
                    return None
                self._begin(trial)
        return None

    def boundary(self, folder: Path, row: int) -> str:
        """Why the trial of this run should end here: all runs but the last boundary of each seed are compared."""
        if row < 1 or row >= self._tasks:
            return ""
        with self._trouble_said():
            return self._hopeless(self._owners[folder], folder, row)
        return ""

    def ended(self, outcome: Outcome) -> None:
        folder, trial = outcome.folder, self._owners[outcome.folder]
        with self._trouble_said():
            if outcome.cause == "storage":
                # No fault of its settings: it goes on when there is room again.
                self.trouble = outcome.reason
            elif outcome.status in ENDED:
                self._continue(trial)
            elif outcome.status == "FAILED":
                # The reason has been said: runs of studies fail in the same words.
                self._say_ended(trial, "failed", self.trials.fail(trial, f"{folder.name}: {outcome.reason}"))

    def _begin(self, trial: Trial) -> None:
        try:
            self._continue(trial)
        except ConfigError as error:
            # Only this combination is refused: its corners were not.
            self._fail(trial, str(error))

    def _continue(self, trial: Trial) -> None:
        """The next of a trial's runs into the queue; when all have finished, or one was pruned, the trial is over."""
        folders = self._enter(trial)
        stands = [last_status(folder) for folder in folders]
        if "PRUNED" in stands:
            self._prune(trial, _reason(folders[stands.index("PRUNED")]))
        elif all(status == "FINISHED" for status in stands):
            self._complete(trial, folders)
        else:
            number = next(n for n, status in enumerate(stands) if status != "FINISHED")
            if number and (reason := self._hopeless(trial, folders[number - 1], self._tasks)):
                self._prune(trial, f"{folders[number - 1].name}: {reason}")
            else:
                self._wait_for(folders[number])
                self._waiting.append(folders[number])

    def _complete(self, trial: Trial, folders: Sequence[Path]) -> None:
        for folder in folders:
            self._note(trial, folder, self._tasks)
        rows = [self._objectives(folder) for folder in folders]
        values = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        missing = [name for name, value in zip(self.tune.objectives, values, strict=True) if not math.isfinite(value)]
        if missing:
            self._fail(trial, f"it has no {missing[0]} on {self.protocol.tuned_on}")
        else:
            reached = zip(self.tune.objectives, values, strict=True)
            said = ", ".join(f"{named(name)} {number(name, value)}" for name, value in reached)
            self._say_ended(trial, f"finished, {said}", self.trials.complete(trial, values))

    def _prune(self, trial: Trial, reason: str) -> None:
        for folder in self._folders.get(trial.number, []):
            if last_status(folder) == "WAITING":
                record_lost(folder, "PRUNED", f"not begun: its trial was pruned, {reason}")
        self._say_ended(trial, f"pruned, {reason}", self.trials.prune(trial, reason))

    def _fail(self, trial: Trial, reason: str) -> None:
        self._say_ended(trial, f"FAILED. {reason}", self.trials.fail(trial, reason))

    def _say_ended(self, trial: Trial, what: str, trouble: str) -> None:
        """A line for every trial, and how many have ended by now; or why this one is not ours any more."""
        self._say(trouble or f"{trial.name}: {what} ({self.trials.progress()})")

    def _hopeless(self, trial: Trial, folder: Path, row: int) -> str:
        """Write down what a run has reached after this row, and say why the trial should end there, if it should."""
        place, values = self._note(trial, folder, row)
        if not self.tune.prune or row < FIRST_BOUNDARY or self.trials.is_default(trial):
            return ""
        finished = self.trials.finished_at(place)
        if not worse_than_most(values, finished, self.trials.directions, least=self.tune.prune_after):
            return ""
        return f"after {row} tasks worse than the median of {len(finished)} finished trials"

    def _note(self, trial: Trial, folder: Path, row: int) -> tuple[str, list[float]]:
        values, seed = self._objectives(folder), int(folder.name.rpartition("-s")[2])
        place = f"seed {seed} row {row}"
        self.trials.passed(trial, place, self.tune.seeds.index(seed) * self._tasks + row, values)
        return place, values

    def _objectives(self, folder: Path) -> list[float]:
        metrics = measured(folder)
        return [metrics.get(name, math.nan) for name in self.tune.objectives]

    def _enter(self, trial: Trial) -> list[Path]:
        """The trial's run folders, made and entered in study.yaml and planned.json where they are not there yet."""
        if trial.number in self._folders:
            return self._folders[trial.number]
        values = self.protocol.space.values(trial.params)
        runs = expand(self.protocol.study_of({trial.name: values}))
        planned = (read_plan(self.folder) or {"variants": {}})["variants"]
        folders = [self.folder / f"{run.variant}-s{run.seed}" for run in runs]
        with writing(self.folder):
            if trial.name not in self._variants:
                entered = {**self._variants, trial.name: self.protocol.space.changes(values)}
                enter_trials(self.folder, self.protocol, entered)
                self._variants = entered
            if trial.name not in planned:
                planned |= {trial.name: plain(runs[0])}
                streams = list(self.protocol.streams)
                write_json(self.folder / PLAN, {"seeds": self.tune.seeds, "variants": planned, "streams": streams})
            lay_out_runs(self.folder, runs)
            for folder in folders:
                self._owners[folder] = trial
                if not (folder / NAME).is_file():
                    mark(folder, self.protocol.tags() | {"trial": str(trial.number)})
        self._folders[trial.number] = folders
        return folders

    def _wait_for(self, folder: Path) -> None:
        """A worker whose tune was killed ends the run that it has in hand; two must not work on one.

        Jobs of a scheduler are taken up by the launcher instead, which answers what they ask.
        """
        if self._waits and is_busy(folder):
            self._say(f"{folder.name}: a worker of the tune that was killed is still at it; waiting for it")
            while is_busy(folder):
                time.sleep(0.5)

    @contextmanager
    def _trouble_said(self) -> Iterator[None]:
        """A disk or database that fails ends the search, and no run."""
        try:
            with storage_errors(self.trials.url):
                yield
        except ConfigError:
            raise
        except ClplatError as error:
            self.trouble = str(error)


def enter_trials(folder: Path, protocol: Protocol, variants: Mapping[str, dict[str, Any]]) -> None:
    """Write study.yaml: the trials as an ordinary study, whose variants they are."""
    save(dataclasses.replace(protocol.trials, variants=dict(variants)), folder / "study.yaml")


def _reason(folder: Path) -> str:
    """Why a run ended as it did."""
    return f"{folder.name}: {[entry['reason'] for entry in read(folder) if entry['kind'] == 'status'][-1]}"


def mark(folder: Path, tags: Mapping[str, str]) -> None:
    """The first entry of a run's journal: what it belongs to."""
    journal = Journal(folder)
    journal.tags(tags)
    journal.flush()
