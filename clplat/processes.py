"""Several processes that train one run: they and their group exist before the task loop starts.

Started by `torchrun`, or here: `spawn` starts one process for each rank and waits for them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clplat.errors import ConfigError
from clplat.interruption import EXIT_INTERRUPT, EXIT_REQUEUE, SIGNALS, exit_code, passed_on
from clplat.storage import write_json

FAILURES = "failure-of-process-*.json"
"""What processes that fail leave in their run's folder for whoever started them."""
LOST = ("/gloo/", "NCCL", "ProcessGroup", "closed by peer", "reset by peer")
"""Words in errors about a partner that is gone."""
LAST_WORDS = 5.0
"""Seconds that the others have for theirs when one process has failed."""


def inside_group() -> bool:
    """Whether this process was started as one of several that train one run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """This process's number among those that train one run."""
    return int(os.environ.get("RANK", "0"))


def join(devices: int, on_gpu: bool) -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."""
    import torch
    import torch.distributed as dist

    if not inside_group() or dist.is_initialized():
        return
    size = int(os.environ["WORLD_SIZE"])
    if size != devices:
        raise ConfigError(f"training.devices: is {devices}, but {size} processes were started; set it to {size}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    # The group knows its device: else NCCL guesses at the first barrier, and connects only then.
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device)


def note_failure(folder: Path, reason: str, cause: str) -> None:
    """Leave word of a failure for whoever started the processes."""
    said = {"time": time.time(), "rank": rank(), "reason": reason, "cause": cause}
    write_json(folder / FAILURES.replace("*", str(rank())), said)


def first_failure(folder: Path) -> dict[str, Any] | None:
    """The failure from which others may have followed: a process whose partner is gone loses its connection, and may
    say so before the partner has said why it went."""
    found = [json.loads(path.read_text()) for path in folder.glob(FAILURES)]
    return min(found, key=lambda said: (any(word in said["reason"] for word in LOST), said["time"]), default=None)


def leave() -> None:
    """Take the process group down, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def spawn(folder: Path, devices: int, options: Sequence[str] = ()) -> int:
    """Run one folder with `devices` processes on this machine; the exit code of the first that failed, or 0.

    A process that is asked to stop before it listens dies of the signal: that is the stop's exit code too.
    """
    from torch.distributed import TCPStore

    for failure in folder.glob(FAILURES):
        failure.unlink()
    # Here, and not with rank zero: a port that was found free and let go may be another's by the time it listens.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "clplat.execution", str(folder), *options],
            env=os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in range(devices)
    ]

    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        at_once = number == signal.SIGINT and signal.SIGINT in asked
        asked.append(number)
        for child in children:
            child.send_signal(signal.SIGKILL if at_once else passed_on(number))

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        code = _wait(children)
        return exit_code(signal.Signals(asked[0]).name) if asked and code else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails the others are stopped, since they would wait for it for ever."""
    while any(child.poll() is None for child in children):
        failed = [child for child in children if child.poll() not in (None, 0, EXIT_REQUEUE, EXIT_INTERRUPT)]
        if failed:
            end = time.monotonic() + LAST_WORDS
            while any(child.poll() is None for child in children) and time.monotonic() < end:
                time.sleep(0.05)
            for child in children:
                child.kill()
        time.sleep(0.05)
    return next((child.returncode for child in children if child.returncode), 0)
