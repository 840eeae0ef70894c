"""The `local` launcher: the runs of a study on this machine, one after another or side by side.

Workers are processes of their own that carry out one run folder after another; they talk in JSON lines over a
socket pair. A worker that dies takes only its present run with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from clplat.config import load_run
from clplat.errors import ClplatError, RunBusyError
from clplat.execution import Outcome, execute, failed
from clplat.interruption import EXIT_REQUEUE, Interruption, exit_code
from clplat.progress import Asking, Board, Progress, RunBar
from clplat.storage import full_disk
from clplat.supply import Listed, Supply


def launch(folders: Sequence[Path], *, workers: int, threads: int, console: Console) -> list[Outcome]:
    """Carry out run folders with `workers` processes; outcomes in the order of the folders."""
    listed, devices = Listed(folders), most_devices(folders)
    code = serve(
        listed, runs=len(folders), workers=min(workers, len(folders)), threads=threads, devices=devices,
        console=console,
    )  # fmt: skip
    return listed.outcomes(code)


def most_devices(folders: Sequence[Path]) -> int:
    """The devices of the run that takes most of them; variants may differ in it."""
    return max((load_run(folder / "config.yaml").training.devices for folder in folders), default=1)


def serve(supply: Supply, *, runs: int, workers: int, threads: int, devices: int = 1, console: Console) -> int:
    """Carry out what a supply gives with `workers` processes; `runs` is how many a person is told to expect, `devices`
    how many of the GPUs each worker sees.

    Returns the exit code of the stop that was asked for, 0 when nobody did.
    """
    with Board(console, runs) as board:
        if workers <= 1:
            return _one_by_one(supply, board)
        return _Pool(supply, workers, threads, devices, board).run()


def announce(board: Board, outcome: Outcome) -> None:
    """One line for a run that did not finish."""
    if outcome.status not in ("FINISHED", "PRUNED"):
        board.say(f"{outcome.folder.name}: {outcome.status}. {outcome.reason}")


def _one_by_one(supply: Supply, board: Board) -> int:
    while (folder := supply.take()) is not None:
        bar = board.opened(folder.name)
        progress = Asking(bar, partial(supply.boundary, folder)) if supply.asks else bar
        outcome = execute_safely(folder, progress)
        board.closed(bar, outcome.status)
        announce(board, outcome)
        supply.ended(outcome)
        if outcome.status == "KILLED":
            return outcome.code
    return 0


@dataclass(kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    link: socket.socket
    slot: int
    ready: bool = False
    text: str = ""
    folder: Path | None = None
    bar: RunBar | None = None


class _Pool:
    """Hands out folders and listens to workers until there is nothing more to hand out."""

    def __init__(self, supply: Supply, workers: int, threads: int, devices: int, board: Board) -> None:
        self._supply, self._workers, self._threads, self._board = supply, workers, threads, board
        self._devices = devices
        self._selector = selectors.DefaultSelector()
        self._stop: int | None = None

    def run(self) -> int:
        with self._signals():
            for slot in range(self._workers):
                self._start(slot)
            while self._selector.get_map():
                for key, _ in self._selector.select(timeout=0.2):
                    self._hear(key.data)
        return self._stop_code()

    def _stop_code(self) -> int:
        """The exit code of what was asked for; 0 while nobody asked to stop."""
        return 0 if self._stop is None else exit_code(signal.Signals(self._stop).name)

    def _start(self, slot: int) -> None:
        """A worker for the next folder, if there is one to be had."""
        folder = None if self._stop is not None else self._supply.take()
        if folder is None:
            return
        ours, theirs = socket.socketpair()
        # Ctrl-C, which a terminal sends to all, waits at the worker's door until it knows what to do about it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "clplat.launch", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": str(self._threads)} | _gpus_of(slot, self._devices),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        worker = _Worker(process=process, link=ours, slot=slot)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        # A stop that came while the process was being made has not met it.
        self._give(worker, folder if self._stop is None else None)

    def _give(self, worker: _Worker, folder: Path | None) -> None:
        """The next folder for an idle worker, or leave to go."""
        if folder is None:
            self._selector.unregister(worker.link)
            worker.link.close()
            worker.process.wait()
            return
        worker.folder = folder
        worker.bar = self._board.opened(folder.name)
        worker.link.sendall(_line([str(folder), self._supply.asks]))

    def _hear(self, worker: _Worker) -> None:
        try:
            received = worker.link.recv(1 << 16).decode()
        except ConnectionError:
            received = ""
        if not received:
            self._lost(worker)
            return
        *lines, worker.text = (worker.text + received).split("\n")
        for kind, content in map(json.loads, lines):
            if kind == "ready":
                worker.ready = True
            elif kind == "ended":
                self._ended(worker, Outcome(**content | {"folder": worker.folder}))
                self._give(worker, None if self._stop is not None else self._supply.take())
            elif kind == "asks":
                assert worker.folder is not None
                # Who asks and dies before the answer is met as lost at the next turn.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.link.sendall(_line(self._supply.boundary(worker.folder, content)))
            elif worker.bar is not None:
                getattr(worker.bar, kind)(*content)

    def _ended(self, worker: _Worker, outcome: Outcome) -> None:
        assert worker.folder is not None and worker.bar is not None
        self._board.closed(worker.bar, outcome.status)
        announce(self._board, outcome)
        self._supply.ended(outcome)

    def _lost(self, worker: _Worker) -> None:
        """A worker died with a run in its hands: it failed, unless it was stopped; another goes on with the rest."""
        self._selector.unregister(worker.link)
        worker.link.close()
        code = worker.process.wait()
        assert worker.folder is not None
        from clplat.journal import record_lost

        status = "FAILED" if self._stop is None else "KILLED"
        why = f"its process died (exit code {code})" if self._stop is None else "stopped"
        reason = f"{why}; `clplat resume {worker.folder}` goes on from what was saved"
        try:
            record_lost(worker.folder, status, reason)
        except (ClplatError, OSError) as error:
            self._board.say(f"{worker.folder.name}: {error}")  # a full disk; the other runs go on
        outcome = Outcome(
            folder=worker.folder, status=status, reason=reason, code=self._stop_code() or 1, cause="process"
        )  # fmt: skip
        self._ended(worker, outcome)
        self._start(worker.slot)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass a request to stop on to the workers, and hand out nothing more."""

        def asked(number: int, _: object) -> None:
            again = self._stop is not None
            self._stop = number
            for worker in [key.data for key in self._selector.get_map().values()]:
                if again or not worker.ready:
                    worker.process.kill()
                elif number != signal.SIGINT:
                    worker.process.send_signal(number)

        kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, asked) for number in kinds}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _gpus_of(slot: int, devices: int) -> dict[str, str]:
    """Environment that gives a worker as many of the visible GPUs as its runs need, in turn."""
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    first = slot % max(1, len(names) // devices) * devices
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + devices])}


def _line(content: Any) -> bytes:
    return (json.dumps(content) + "\n").encode()


class _Link:
    """A worker's side: progress and outcomes as JSON lines, progress at most five times a second."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self._sent = link, 0.0

    def send(self, kind: str, content: Any) -> None:
        # A launcher that is gone (a closed terminal, a kill) is no reason to lose a healthy run.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._link.sendall(_line([kind, content]))

    def step(self, task: str, done: int, total: int, loss: float | None) -> None:
        import time

        now = time.monotonic()
        if now - self._sent > 0.2 or done == total:
            self._sent = now
            self.send("step", [task, done, total, loss])

    def boundary(self, row: int, summary: Mapping[str, float]) -> None:
        self.send("boundary", [row, dict(summary)])


def work(descriptor: int) -> None:
    """A worker's life: folders come in over the socket, outcomes go out; it ends when the socket closes."""
    # A run that is under way listens itself; a request that comes between two runs must not be lost.
    stop = Interruption()
    link = socket.socket(fileno=descriptor)
    messages = _Link(link)
    with stop.listening(), link.makefile() as lines:

        def ask(row: int) -> str:
            messages.send("asks", row)
            # Nobody there to answer is no reason to end.
            return json.loads(lines.readline() or '""')

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        messages.send("ready", None)
        for line in lines:
            name, asks = json.loads(line)
            folder, progress = Path(name), Asking(messages, ask) if asks else messages
            outcome = stopped(folder, stop) if stop.requested else execute_safely(folder, progress)
            said = {"status": outcome.status, "reason": outcome.reason, "code": outcome.code, "cause": outcome.cause}
            messages.send("ended", said)


def stopped(folder: Path, stop: Interruption) -> Outcome:
    """A run that was handed out when a stop had been asked for already."""
    return Outcome(folder=folder, status="KILLED", reason="not started", code=exit_code(stop.requested or "SIGTERM"))


def execute_safely(folder: Path, progress: Progress) -> Outcome:
    """A run that cannot even be started (busy, unreadable) is an outcome too."""
    try:
        return execute(folder, progress)
    except RunBusyError as error:
        return Outcome(folder=folder, status="BUSY", reason=str(error), code=EXIT_REQUEUE)
    except ClplatError as error:
        return failed(folder, error)
    except OSError as error:
        return failed(folder, full_disk(folder, error))


if __name__ == "__main__":
    work(int(sys.argv[1]))
