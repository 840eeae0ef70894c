"""The `local` launcher: the runs of a study on this machine, one after another or side by side.

Workers are processes of their own, forked by a nursery, that carry out one run folder after another; they talk in JSON
lines over a socket pair. A worker that dies takes only its present run with it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clplat.execution import Outcome, execute_safely
from clplat.interruption import Interruption, exit_code, signals_to
from clplat.launchers.desk import Desk
from clplat.launchers.nursery import Nursery, tend
from clplat.progress import Asking


class Local:
    """Runs on this machine: `workers` processes with `threads` threads each; one run after another in this process."""

    def __init__(self, *, workers: int, threads: int, devices: int = 1, record: bool = False) -> None:
        """`devices`: how many of the GPUs each worker sees. `record`: runs feed MLflow, so that workers may import it
        beforehand."""
        self.workers, self.threads, self.devices, self.record = workers, threads, devices, record
        self._nursery: Nursery | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, what workers import is being imported already."""
        if self.workers <= 1 or self._nursery is not None:
            yield
            return
        self._nursery = Nursery(threads=self.threads, record=self.record)
        try:
            yield
        finally:
            self._nursery.close()
            self._nursery = None

    def serve(self, desk: Desk) -> int:
        """Carry out what there is; the exit code of the stop that was asked for, 0 when nobody did."""
        if self.workers <= 1:
            return _one_by_one(desk)
        pool = _Pool(desk, self.workers, self.devices)
        with pool.signals(), self.ready():
            assert self._nursery is not None
            return pool.run(self._nursery)


def _one_by_one(desk: Desk) -> int:
    # Every run begins with a collection, which need not walk what was imported before (0.3 s of CPU time each).
    gc.freeze()
    try:
        while (folder := desk.take()) is not None:
            bar = desk.bar(folder)
            outcome = execute_safely(folder, Asking(bar, partial(desk.boundary, folder)) if desk.asks else bar)
            desk.ended(outcome)
            if outcome.status == "KILLED":
                return outcome.code
        return 0
    finally:
        gc.unfreeze()


@dataclass(kw_only=True)
class _Worker:
    link: socket.socket
    slot: int
    pid: int | None = None
    """Known when it is ready."""
    text: str = ""
    folder: Path | None = None


class _Pool:
    """Hands out folders and listens to workers until there is nothing more to hand out."""

    def __init__(self, desk: Desk, workers: int, devices: int) -> None:
        self._desk, self._workers, self._devices = desk, workers, devices
        self._selector = selectors.DefaultSelector()
        self._nursery: Nursery | None = None
        self._stop: int | None = None

    def run(self, nursery: Nursery) -> int:
        """Until all workers have left; the exit code of the stop that was asked for, 0 when nobody did."""
        self._nursery = nursery
        for slot in range(self._workers):
            self._start(nursery, slot)
        while self._selector.get_map():
            for key, _ in self._selector.select(timeout=0.2):
                self._hear(nursery, key.data)
        return self._stop_code()

    def _stop_code(self) -> int:
        """The exit code of what was asked for; 0 while nobody asked to stop."""
        return 0 if self._stop is None else exit_code(signal.Signals(self._stop).name)

    def _start(self, nursery: Nursery, slot: int) -> None:
        """A worker for the next folder, if there is one to be had."""
        folder = None if self._stop is not None else self._desk.take()
        if folder is None:
            return
        ours, theirs = socket.socketpair()
        nursery.start(theirs, _gpus_of(slot, self._devices))
        theirs.close()
        worker = _Worker(link=ours, slot=slot)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        # A stop that came while the worker was being asked for has not met it.
        self._give(nursery, worker, folder if self._stop is None else None)

    def _give(self, nursery: Nursery, worker: _Worker, folder: Path | None) -> None:
        """The next folder for an idle worker, or leave to go."""
        if folder is None:
            self._selector.unregister(worker.link)
            worker.link.close()
            if worker.pid is not None:
                nursery.code(worker.pid)
            return
        worker.folder = folder
        self._desk.bar(folder)
        worker.link.sendall(_line([str(folder), self._desk.asks]))

    def _hear(self, nursery: Nursery, worker: _Worker) -> None:
        try:
            received = worker.link.recv(1 << 16).decode()
        except ConnectionError:
            received = ""
        if not received:
            self._lost(nursery, worker)
            return
        *lines, worker.text = (worker.text + received).split("\n")
        for kind, content in map(json.loads, lines):
            if kind == "ready":
                worker.pid = content
                if self._stop is not None:
                    # It was born as the stop came, and has not met it.
                    os.kill(content, signal.SIGKILL)
            elif kind == "ended":
                self._desk.ended(Outcome(**content | {"folder": worker.folder}))
                self._give(nursery, worker, None if self._stop is not None else self._desk.take())
            elif kind == "asks":
                assert worker.folder is not None
                # Who asks and dies before the answer is met as lost at the next turn.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.link.sendall(_line(self._desk.boundary(worker.folder, content)))
            else:
                assert worker.folder is not None
                getattr(self._desk.bar(worker.folder), kind)(*content)

    def _lost(self, nursery: Nursery, worker: _Worker) -> None:
        """A worker died with a run in its hands; another goes on with the rest."""
        self._selector.unregister(worker.link)
        worker.link.close()
        code = None if worker.pid is None else nursery.code(worker.pid)
        assert worker.folder is not None
        died = "its process died" if code is None else f"its process died (exit code {code})"
        why = died if self._stop is None else "stopped"
        self._desk.lost(worker.folder, why, stopped=self._stop_code())
        self._start(nursery, worker.slot)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Pass a request to stop on to the workers, and hand out nothing more."""

        def asked(number: int, _: object) -> None:
            again = self._stop is not None
            self._stop = number
            workers = [key.data for key in self._selector.get_map().values()]
            if self._nursery is not None and any(worker.pid is None for worker in workers):
                # With it go those that are not born yet; nobody asks for another.
                self._nursery.stop()
            for worker in workers:
                if worker.pid is not None and (again or number != signal.SIGINT):
                    # One that ended in this moment is gone.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.pid, signal.SIGKILL if again else number)

        with signals_to(asked):
            yield


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
        messages.send("ready", os.getpid())
        for line in lines:
            name, asks = json.loads(line)
            folder, progress = Path(name), Asking(messages, ask) if asks else messages
            outcome = stopped(folder, stop) if stop.requested else execute_safely(folder, progress)
            said = {"status": outcome.status, "reason": outcome.reason, "code": outcome.code, "cause": outcome.cause}
            messages.send("ended", said)


def stopped(folder: Path, stop: Interruption) -> Outcome:
    """A run that was handed out when a stop had been asked for already."""
    return Outcome(folder=folder, status="KILLED", reason="not started", code=exit_code(stop.requested or "SIGTERM"))


if __name__ == "__main__":
    tend(int(sys.argv[1]), sys.argv[2] == "1", work)
