"""What a run on another machine and the process that launched it tell one another: small files in RUN/job.

    expected.json   written by the launcher: whether the run asks at its boundaries, and the scheduler's job
    progress.json   the run's last step and boundary
    asked.json      a row of the result table, of which the run wants to know whether to go on; answer.json: the answer
    outcome.json    how it ended; without it, and without its job, the run was lost

The folder is there as long as a launcher counts on the run. Every file is replaced whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clplat import lease
from clplat.config import load_run
from clplat.errors import ClplatError, ConfigError
from clplat.execution import Outcome, execute_safely, failed
from clplat.journal import last_status, record_lost
from clplat.machine import check_room
from clplat.progress import Asking
from clplat.tracking import read_json, write_json

FOLDER = "job"
SECONDS = 1.0
"""Between two files of progress."""
ANSWER_SECONDS = 300.0
"""So long an answer is waited for from a tune that holds its folder: minutes, since network disks may be late."""


def expect(run: Path, *, asks: bool) -> None:
    """Before a run is handed over: nothing is left there of an earlier job."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    (run / FOLDER).mkdir()
    write_json(run / FOLDER / "expected.json", {"asks": asks, "job": ""})


def expect_job(run: Path, job: str) -> None:
    """A run has been handed over as this job."""
    write_json(run / FOLDER / "expected.json", (expected(run) or {"asks": False}) | {"job": job})


def expected(run: Path) -> dict[str, Any] | None:
    """What `expect` wrote; None where no launcher counts on this run."""
    return _read(run, "expected")


def collected(run: Path) -> None:
    """Nobody counts on this run any more."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def outcome(run: Path) -> Outcome | None:
    """How the job of a run ended; None while it has not, or when it was lost."""
    found = _read(run, "outcome")
    return None if found is None else Outcome(folder=run, **found)


def told(run: Path) -> dict[str, list[Any]]:
    """The last that a run has told of itself: the arguments of `step` and `boundary`; nothing before it trains."""
    return _read(run, "progress") or {}


def question(run: Path) -> int | None:
    """The row after which a run asks whether to go on; None where it has its answer."""
    asked, answered = _read(run, "asked"), _read(run, "answer")
    return None if asked is None or (answered is not None and answered["row"] == asked["row"]) else asked["row"]


def answer(run: Path, row: int, reason: str) -> None:
    """Tell a run why it should end; an empty reason lets it go on."""
    write_json(run / FOLDER / "answer.json", {"row": row, "reason": reason})


def work(run: Path) -> Outcome:
    """Carry out a run that a launcher of another process, perhaps on another machine, counts on."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: is not there on this machine; `folder` must lie on a disk that all machines share, under one path"
        )
    (run / FOLDER).mkdir(exist_ok=True)
    (run / FOLDER / "outcome.json").unlink(missing_ok=True)
    found = _carry_out(run)
    if found.status == "FAILED" and last_status(run) in ("WAITING", "RUNNING", "KILLED"):
        record_lost(run, found.status, found.reason)
    said = {"status": found.status, "reason": found.reason, "code": found.code, "cause": found.cause}
    # Without it, where the disk is full or nobody counts on the run by now, the journal tells.
    with suppress(OSError):
        write_json(run / FOLDER / "outcome.json", said)
    return found


def _carry_out(run: Path) -> Outcome:
    teller = _Told(run)
    progress = Asking(teller, teller.ask) if (expected(run) or {}).get("asks") else teller
    try:
        config = load_run(run / "config.yaml")
        check_room(config.training)
    except ClplatError as error:
        return failed(run, error)
    # A machine that was lost a moment ago looks alive until its silence is long enough.
    lease.wait(run)
    return execute_safely(run, progress, feeds=feeds_itself(config.tracking.uri))


def feeds_itself(uri: str) -> bool:
    """Whether a run on another machine may send its own record: SQLite files are for one machine, where whoever
    launched the run sends it from its journal."""
    return not uri.startswith("sqlite")


class _Told:
    """A run's side: what it tells of itself, once a second; and what it asks."""

    def __init__(self, run: Path) -> None:
        self._run, self._written, self._said = run, 0.0, dict[str, Any]()

    def step(self, task: str, done: int, total: int, loss: float | None) -> None:
        self._said["step"] = [task, done, total, loss]
        self._write()

    def boundary(self, row: int, summary: Mapping[str, float]) -> None:
        self._said["boundary"] = [row, dict(summary)]
        self._write()

    def _write(self) -> None:
        if (now := time.monotonic()) - self._written > SECONDS and (self._run / FOLDER).is_dir():
            self._written = now
            # What a person watches is no reason to lose a run.
            with suppress(OSError):
                write_json(self._run / FOLDER / "progress.json", self._said)

    def ask(self, row: int) -> str:
        """The answer of the tune that this run belongs to. Nobody there to answer is no reason to end."""
        write_json(self._run / FOLDER / "asked.json", {"row": row})
        deadline = time.monotonic() + ANSWER_SECONDS
        while lease.is_busy(self._run.parent) and time.monotonic() < deadline:
            found = _read(self._run, "answer")
            if found is not None and found["row"] == row:
                return found["reason"]
            time.sleep(SECONDS / 5)
        return ""


def _read(run: Path, name: str) -> dict[str, Any] | None:
    try:
        return read_json(run / FOLDER / f"{name}.json")
    except OSError:
        # Network disks: the file was replaced while it was read.
        return None


def in_job() -> bool:
    """Whether a scheduler of batch jobs has started this process."""
    return "SLURM_JOB_ID" in os.environ
