"""Who works on a folder: one process at a time, on any machine that shares the disk.

A lease is a small file in the folder, `lease-NNNNNN`, with the host, the process and its start; while it is held its
time of change is the last heartbeat. It is free when it says so, when its holder is gone, or, where that cannot be
seen from here, when the holder has been silent for `SILENCE_SECONDS`. Whoever takes a free one over makes the file of
the next number, which one process alone can (`O_EXCL`, on NFS too); a holder that finds a higher number than its own
has lost the folder and writes nothing more.
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from clplat.errors import ConfigError, RunBusyError

BEAT_SECONDS = 10.0
SILENCE_SECONDS = 120.0
"""After so long a silence a holder on another machine counts as gone: more than the minute for which a network disk
may show an old time of change, and several beats."""
FREE = "free"
_NAME = re.compile(r"lease-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process: its host, what tells apart machines of one name (boot, process namespace), its id and its start."""

    host: str
    machine: str
    pid: int
    start: str


class Lease:
    """A folder that this process holds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self) -> None:
        """Raise `RunBusyError` when another process has taken the folder over; for a moment before each write."""
        newest = _newest(self._path.parent)
        if newest is not None and newest != self._path:
            raise RunBusyError(
                f"{self._path.parent}: {_said(newest)} has taken this run over, since this process was silent for so "
                "long; it goes on there, and nothing more is written here"
            )

    def beat(self) -> None:
        """Say that the holder lives; the time is the file server's, so that clocks need not agree."""
        # One that was taken over is told so at its next write.
        with suppress(FileNotFoundError):
            os.utime(self._path)

    def release(self) -> None:
        """Say that the folder is free."""
        # The number stays, so that a slow taker of an older one cannot begin again at it.
        with suppress(FileNotFoundError), self._path.open("r+b", buffering=0) as file:
            # In this order: an empty file is one that is being taken.
            file.write(FREE.encode())
            file.truncate(len(FREE))


@contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Hold a folder while inside; raises `RunBusyError` where another process does."""
    lease = take(folder)
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(lease, over), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join()
        lease.release()


def _beat(lease: Lease, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        # A file server that is away for a while is met where something is written.
        with suppress(OSError):
            lease.beat()


def take(folder: Path) -> Lease:
    """Make the lease of a folder this process's."""
    newest = refuse_busy(folder)
    path = folder / f"lease-{(_number(newest) if newest else 0) + 1:06d}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError as error:
        raise RunBusyError(f"{folder}: another process has begun to work on this run at this moment") from error
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(this_process())))
    except OSError:  # a full disk; an empty lease would keep everybody out
        path.unlink(missing_ok=True)
        raise
    if _newest(folder) != path:
        # The one that was free when we looked has been taken, given back and taken again.
        path.unlink(missing_ok=True)
        raise RunBusyError(f"{folder}: another process has begun to work on this run at this moment")
    for old in _files(folder)[:-1]:
        old.unlink(missing_ok=True)
    return Lease(path)


def refuse_busy(folder: Path) -> Path | None:
    """The newest lease of a folder, which is free; raises `RunBusyError` where it is not."""
    newest = _newest(folder)
    if newest is not None and not _free(newest):
        raise RunBusyError(
            f"{folder}: {_said(newest)} works on this run already; wait for it or stop it first. If its machine is "
            f"gone, the run is free {SILENCE_SECONDS:.0f} s after its last heartbeat"
        )
    return newest


def is_busy(folder: Path) -> bool:
    """Whether a process works on this folder at this moment."""
    newest = _newest(folder)
    return newest is not None and not _free(newest)


def wait(folder: Path) -> None:
    """Give a holder that has gone without a word the time to be known as gone; one that lives is waited for no longer.

    For whoever is started in the place of another that may have died a moment ago on another machine.
    """
    deadline = time.monotonic() + SILENCE_SECONDS + 2 * BEAT_SECONDS
    while is_busy(folder) and time.monotonic() < deadline:
        time.sleep(1.0)


def holder(folder: Path) -> Holder | None:
    """Who holds a folder, or held it last; None where nobody has, or where it was given back."""
    newest = _newest(folder)
    return None if newest is None else _read(newest)


@cache
def _machine() -> str:
    """What no two running machines, nor two containers of one, have in common."""
    import psutil

    marks = []
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            marks.append(os.readlink(place) if place.endswith("pid") else Path(place).read_text().strip())
    return " ".join(marks) or f"booted {psutil.boot_time():.0f}"


def this_process() -> Holder:
    """This process, as a holder."""
    pid = os.getpid()
    return Holder(host=platform.node(), machine=_machine(), pid=pid, start=_start(pid))


def _start(pid: int) -> str:
    """When a process of this machine began, empty when it is gone: ids are given out again."""
    import psutil

    stat = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").is_file():
            # Ticks since the machine was started, which no change of its clock moves; its state stands in front.
            fields = stat.read_text().rpartition(")")[2].split()
            return "" if fields[0] in "ZX" else fields[19]
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except (OSError, psutil.Error):
        return ""


def _free(path: Path) -> bool:
    """Whether a lease may be taken over. On its own machine the kernel knows, elsewhere the last heartbeat tells."""
    try:
        if path.read_text().startswith(FREE):
            return True
        found = _read(path)
        if found is not None and found.machine == _machine():
            return _start(found.pid) != found.start
        return _now(path.parent) - path.stat().st_mtime > SILENCE_SECONDS
    except FileNotFoundError:
        # A newer one has taken its place in this moment.
        return False


def _read(path: Path) -> Holder | None:
    """None where nobody is named: given back, or written at this moment."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _said(path: Path | None) -> str:
    found = _read(path) if path is not None else None
    return f"process {found.pid} on {found.host}" if found else "another process"


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of this folder."""
    probe = folder / f".now-{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); see that you own it") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _files(folder: Path) -> list[Path]:
    named = [path for path in folder.glob("lease-*") if _NAME.fullmatch(path.name)]
    return sorted(named, key=_number)


def _newest(folder: Path) -> Path | None:
    return next(reversed(_files(folder)), None)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("lease-"))
