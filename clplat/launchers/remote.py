"""Runs on machines that share the run folders' disk with this one: submitted, watched, collected."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from clplat import lease
from clplat.config import load_run
from clplat.errors import ClplatError, Interrupted
from clplat.execution import Outcome
from clplat.interruption import exit_code, signals_to
from clplat.journal import ENDED, last_status
from clplat.launchers import post
from clplat.launchers.desk import Desk

MANY = 1000
"""Runs in hand at once, at most: more than Slurm takes in one array as it is shipped (MaxArraySize 1001)."""


@dataclass(frozen=True, kw_only=True)
class End:
    """What a scheduler knows of a run's end: its process was lost, was cancelled, or could not work there at all."""

    why: str
    kind: Literal["lost", "cancelled", "refused"] = "lost"


class Scheduler(Protocol):
    """Starts runs elsewhere."""

    def submit(self, runs: Sequence[Path], *, asks: bool) -> None:
        """Have these carried out; raises `ClplatError` where it refuses."""
        ...

    def ended(self) -> Mapping[Path, End]:
        """Runs that are under way no longer, each told once or again until it is forgotten."""
        ...

    def forget(self, run: Path) -> None:
        """A run's end has been collected."""
        ...

    def cancel(self, runs: Sequence[Path], *, at_once: bool) -> None:
        """Ask runs to save themselves and end, or end them `at_once`."""
        ...


class Remote:
    """Keeps as many runs at a scheduler as there is `room` for, and looks after them every `seconds`."""

    def __init__(self, scheduler: Scheduler, *, room: int, seconds: float) -> None:
        self._scheduler, self._room, self._seconds = scheduler, min(room, MANY), seconds
        self._in_hand: list[Path] = []
        self._asked: list[int] = []
        self._refusal: ClplatError | None = None

    def serve(self, desk: Desk) -> int:
        """Carry out what there is; the exit code of the stop that was asked for, 0 when nobody did.

        Raises what the scheduler refused with, when the runs in hand have ended.
        """
        with self._signals():
            told = 0
            while True:
                if not self._asked and self._refusal is None:
                    self._submit(desk)
                if len(self._asked) > told:
                    told = len(self._asked)
                    self._scheduler.cancel(self._in_hand, at_once=told > 1)
                if not self._in_hand:
                    break
                self._look(desk)
                self._wait(told)
        if self._refusal is not None:
            raise self._refusal
        return self._stop_code()

    def _submit(self, desk: Desk) -> None:
        runs = list[Path]()
        while len(self._in_hand) + len(runs) < self._room and (folder := desk.take()) is not None:
            runs.append(folder)
        if not runs:
            return
        try:
            self._scheduler.submit(runs, asks=desk.asks)
        except ClplatError as error:
            self._refusal = error
        else:
            self._in_hand += runs

    def _look(self, desk: Desk) -> None:
        for run in self._in_hand:
            for kind, arguments in post.told(run).items():
                getattr(desk.bar(run), kind)(*arguments)
            if desk.asks and (row := post.question(run)) is not None:
                post.answer(run, row, desk.boundary(run, row))
        for run, end in self._scheduler.ended().items():
            self._collect(desk, run, end)

    def _collect(self, desk: Desk, run: Path, end: End) -> None:
        """Tell how a run ended; one whose process may live yet is left for another look."""
        outcome = post.outcome(run)
        if outcome is None and lease.is_busy(run):
            return
        if outcome is None and (status := last_status(run)) in ENDED:
            # A network disk may show a new file later than a longer one.
            outcome = Outcome(folder=run, status=status)
        self._in_hand.remove(run)
        self._scheduler.forget(run)
        post.collected(run)
        self._send(run)
        if outcome is not None:
            # Whatever signal the scheduler sent it: what was asked for here is the study's exit code.
            stopped = self._asked and outcome.status == "KILLED"
            desk.ended(replace(outcome, code=self._stop_code()) if stopped else outcome)
        elif self._asked:
            desk.lost(run, "stopped", stopped=self._stop_code())
        elif end.kind == "cancelled":
            desk.lost(run, end.why, stopped=exit_code("SIGTERM"))
        else:
            desk.lost(run, end.why, again=end.kind == "lost")

    def _send(self, run: Path) -> None:
        """To MLflow, what the run could not send itself."""
        from clplat.study_record import send_unsent

        tracking = load_run(run / "config.yaml").tracking
        if tracking.enabled and not post.feeds_itself(tracking.uri):
            # What stays behind is said at the end of the study, which tries it again.
            send_unsent([run])

    def _stop_code(self) -> int:
        return exit_code(signal.Signals(self._asked[0]).name) if self._asked else 0

    def _wait(self, told: int) -> None:
        """Until the next look, or until somebody asks to stop."""
        until = time.monotonic() + self._seconds
        while time.monotonic() < until and len(self._asked) == told:
            time.sleep(min(0.1, self._seconds))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first request cancels all runs, which save themselves; the second ends them at once; the third leaves."""

        def asked(number: int, _: object) -> None:
            self._asked.append(number)
            if len(self._asked) > 2:
                raise Interrupted(signal.Signals(number).name)

        with signals_to(asked):
            yield
