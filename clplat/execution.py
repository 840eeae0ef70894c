"""Carry out the run of one folder: lease, status, record, and what becomes of every way to end.

`python -m clplat.execution FOLDER` is how processes of one run are started.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clplat import processes
from clplat.config import RunConfig, load_run
from clplat.errors import ClplatError, Interrupted, Pruned, RunBusyError, StorageError
from clplat.interruption import EXIT_INTERRUPT, EXIT_REQUEUE, Interruption, exit_code
from clplat.journal import Journal, read, record_lost
from clplat.lease import Lease, held, refuse_busy
from clplat.progress import Progress, Silent
from clplat.storage import FULL, Reserve, full_disk

JOURNAL_ONLY = "--journal-only"
"""Tells a process of a run that it does not feed MLflow."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: FINISHED, FAILED, KILLED or PRUNED, and why; BUSY when another process has it in hand."""

    folder: Path
    status: str
    reason: str = ""
    code: int = 0
    cause: Literal["", "process", "storage", "memory"] = ""
    """What failed where it may not have been the run itself, which can go on from its checkpoint: its process, the
    disk, or the memory of its device."""


def execute(folder: Path, progress: Progress | None = None, *, feeds: bool = True) -> Outcome:
    """Start the run of `folder`, or take it up where it was stopped; never raises for what ends the run alone.

    `feeds`: whether the run sends its record to MLflow by itself; otherwise whoever launched it does, from its journal.
    Raises `RunBusyError` when another process works on it, or has taken it over since this one fell silent.
    """
    config = load_run(folder / "config.yaml")
    if config.training.devices > 1 and not processes.inside_group():
        refuse_busy(folder)
        code = processes.spawn(folder, config.training.devices, [] if feeds else [JOURNAL_ONLY])
        return _outcome_of_group(folder, code)
    interruption = Interruption()
    rank = processes.rank()
    try:
        # Rank zero alone writes.
        with interruption.listening(), held(folder) if rank == 0 else contextlib.nullcontext() as lease:
            return _carry_out(config, folder, interruption, progress or Silent(), lease, feeds)
    finally:
        processes.leave()


def execute_safely(folder: Path, progress: Progress, *, feeds: bool = True) -> Outcome:
    """A run that cannot even be started (busy, unreadable) is an outcome too."""
    try:
        return execute(folder, progress, feeds=feeds)
    except RunBusyError as error:
        return Outcome(folder=folder, status="BUSY", reason=str(error), code=EXIT_REQUEUE)
    except ClplatError as error:
        return failed(folder, error)
    except OSError as error:
        return failed(folder, full_disk(folder, error))


def _carry_out(
    config: RunConfig, folder: Path, interruption: Interruption, progress: Progress, lease: Lease | None, feeds: bool
) -> Outcome:
    """With everything that rank zero writes, who alone has a lease."""
    from clplat.tracking import Feed

    journal = Journal(folder, lease.check) if lease is not None else None
    feed = Feed(folder, config.tracking) if lease is not None and config.tracking.enabled and feeds else None
    if feed is not None:
        feed.start()
    reserve = Reserve(folder) if lease is not None else None
    try:
        try:
            if journal is not None:
                journal.status("RUNNING")
                journal.flush()
            outcome = _attempt(config, folder, interruption, progress, journal)
        except StorageError as error:
            outcome = failed(folder, error)
        # Not `inside_group`: Lightning has taken WORLD_SIZE away by now.
        if outcome.status == "FAILED" and config.training.devices > 1:
            with contextlib.suppress(OSError):
                processes.note_failure(folder, outcome.reason, outcome.cause)
        if journal is not None and reserve is not None:
            _write_last_words(journal, folder, outcome, reserve)
    except RunBusyError:
        if feed is not None:
            feed.leave()
        raise
    if feed is not None:
        feed.close(outcome.status)
    return outcome


def _attempt(
    config: RunConfig, folder: Path, interruption: Interruption, progress: Progress, journal: Journal | None
) -> Outcome:
    """Train; every way in which that can end becomes an outcome."""
    import torch

    from clplat.assembly import device_for
    from clplat.loop import Run
    from clplat.precision import products

    torch.set_num_threads(config.training.threads)
    try:
        device = device_for(config.training.accelerator)
        processes.join(config.training.devices, device.type == "cuda")
        with products(config.training.precision, device):
            Run(config, folder, journal=journal, interruption=interruption, progress=progress).execute()
    except Interrupted as stop:
        return Outcome(
            folder=folder, status="KILLED", code=exit_code(stop.signal_name),
            reason=f"stopped by {stop.signal_name}; `clplat resume {folder}` goes on from here",
        )  # fmt: skip
    except Pruned as end:
        return Outcome(folder=folder, status="PRUNED", reason=str(end))
    except RunBusyError:
        raise
    except ClplatError as error:
        return failed(folder, error)
    except Exception as error:  # noqa: BLE001 - whatever a user's component raises ends this run alone
        if isinstance(error, OSError) and error.errno in FULL:
            return failed(folder, full_disk(folder, error))
        trace = folder / (f"error-of-process-{processes.rank()}.txt" if processes.rank() else "error.txt")
        with contextlib.suppress(OSError):
            trace.write_text(traceback.format_exc())
        reason = f"{type(error).__name__}: {error} (traceback in {trace})"
        cause: Literal["", "memory"] = "memory" if isinstance(error, torch.OutOfMemoryError) else ""
        return Outcome(folder=folder, status="FAILED", reason=reason, code=1, cause=cause)
    return Outcome(folder=folder, status="FINISHED")


def failed(folder: Path, error: ClplatError) -> Outcome:
    """The outcome of a run that ended in an error which explains itself."""
    cause: Literal["", "storage"] = "storage" if isinstance(error, StorageError) else ""
    return Outcome(folder=folder, status="FAILED", reason=str(error), code=1, cause=cause)


def _write_last_words(journal: Journal, folder: Path, outcome: Outcome, reserve: Reserve) -> None:
    """Status first, by the room that was kept for it where the disk is full; then the files of the record."""
    from clplat.record import write_artifacts

    reserve.release()
    try:
        journal.status(outcome.status, outcome.reason)
        journal.flush()
        write_artifacts(folder)
    except RunBusyError:
        raise
    except (ClplatError, OSError) as error:
        print(f"{folder}: the record could not be completed: {error}", file=sys.stderr)


def _outcome_of_group(folder: Path, code: int) -> Outcome:
    """What its processes wrote down about the end of a run of several."""
    last = [entry for entry in read(folder) if entry["kind"] == "status"]
    status = last[-1]["status"] if last else "FAILED"
    if code in (EXIT_REQUEUE, EXIT_INTERRUPT) and status not in ("FINISHED", "KILLED"):
        reason = f"stopped before it could be saved; `clplat resume {folder}` goes on from what there is"
        if last:
            record_lost(folder, "KILLED", reason)
        return Outcome(folder=folder, status="KILLED", reason=reason, code=code)
    said = processes.first_failure(folder) if code and code not in (EXIT_REQUEUE, EXIT_INTERRUPT) else None
    if said is not None:
        reason = said["reason"] if said["rank"] == 0 else f"process {said['rank']}: {said['reason']}"
        if not last or reason != last[-1].get("reason", ""):
            record_lost(folder, "FAILED", reason)
        return Outcome(folder=folder, status="FAILED", reason=reason, code=code, cause=said["cause"])
    if code and status in ("RUNNING", "FINISHED"):
        reason = f"a process of the run ended with code {code}; `clplat resume {folder}` goes on from what was saved"
        record_lost(folder, "FAILED", reason)
        return Outcome(folder=folder, status="FAILED", reason=reason, code=code, cause="process")
    return Outcome(folder=folder, status=status, reason=last[-1].get("reason", "") if last else "", code=code)


def main() -> int:
    """Entry point of one process of a run."""
    outcome = execute(Path(sys.argv[1]), feeds=JOURNAL_ONLY not in sys.argv)
    # What rank zero has written down, the process that started all of us reads and says; under torchrun nobody does.
    if outcome.status == "FAILED" and (processes.rank() or "TORCHELASTIC_RUN_ID" in os.environ):
        print(f"{outcome.folder.name}, process {processes.rank()}: FAILED. {outcome.reason}", file=sys.stderr)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
