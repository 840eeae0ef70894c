"""Where workers of the `local` launcher come from: a process that has imported what runs need, and forks.

Importing torch, Lightning and MLflow takes as long as a small run. The nursery does it once for all workers, while
the study is being checked. It runs nothing itself and never meets CUDA, and has one thread, so that forking it is safe
(where `threads` is more than 1, those of OpenBLAS too, which takes care of forks).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from clplat.components import WINGS, catalogue

HEADER = struct.Struct("!I")
MODULES = (
    "lightning", "jsonargparse", "matplotlib.markers", "matplotlib.ticker", "clplat.loop", "clplat.study_record",
    "clplat.run_figures",
)  # fmt: skip
"""What every run imports, at its beginning or its end."""
RECORD = ("mlflow.system_metrics.system_metrics_monitor", "mlflow.store.tracking.sqlalchemy_store")
"""What a run imports besides where it feeds MLflow."""
ONE_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""pyarrow's allocator would else begin a thread when it is imported."""


class Nursery:
    """The side of whoever wants workers."""

    def __init__(self, *, threads: int, record: bool) -> None:
        """`threads` of each worker, which OpenMP reads when it is loaded; `record`: they will feed MLflow."""
        self._threads, self._record = threads, record
        self._control, self._process = self._begin()

    def _begin(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        # Ctrl-C, which a terminal sends to all, waits at the worker's door until it knows what to do about it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "clplat.launchers.local", str(theirs.fileno()), str(int(self._record))],
                pass_fds=[theirs.fileno()],
                env=ONE_THREAD | os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            theirs.close()
        return ours, process

    def start(self, link: socket.socket, environment: Mapping[str, str]) -> None:
        """A worker at the other end of `link`, which says its process id there when it is ready."""
        if self._process.poll() is not None:
            self.close()
            self._control, self._process = self._begin()
        content = json.dumps({"environment": dict(environment)}).encode()
        socket.send_fds(self._control, [HEADER.pack(len(content)) + content], [link.fileno()])

    def code(self, pid: int) -> int | None:
        """The exit code of a worker that is leaving or gone, None where nobody can tell."""
        content = json.dumps({"wait": pid}).encode()
        try:
            self._control.sendall(HEADER.pack(len(content)) + content)
            return int(self._control.recv(64))
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        """No worker is born any more; those that are there live on."""
        self._process.kill()

    def close(self) -> None:
        """Leave nothing behind."""
        self.stop()
        self._process.wait()
        self._control.close()


def tend(descriptor: int, record: bool, work: Callable[[int], None]) -> None:
    """The nursery's life, which ends when whoever wants workers is gone; `work(link)` is a worker's."""
    from clplat.mlflow_store import quiet_mlflow

    quiet_mlflow()
    for module in MODULES + (RECORD if record else ()):
        importlib.import_module(module)
    for wing in WINGS:
        catalogue(wing)
    # What is there now is never collected: the pages that workers share stay shared.
    gc.freeze()
    control = socket.socket(fileno=descriptor)
    while request := _next(control):
        content, link = request
        if link is None:
            _, status = os.waitpid(content["wait"], 0)
            control.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        elif os.fork():
            os.close(link)
        else:
            control.close()
            os.environ.update(content["environment"])
            _live(link, work)


def _next(control: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    header, links, _, _ = socket.recv_fds(control, HEADER.size, 1)
    if not header:
        return None
    (size,) = HEADER.unpack(header)
    content = b""
    while len(content) < size:
        content += control.recv(size - len(content))
    return json.loads(content), links[0] if links else None


def _live(link: int, work: Callable[[int], None]) -> None:
    """A worker's life, after which nothing of the nursery's goes on in it."""
    code = 1
    try:
        work(link)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
