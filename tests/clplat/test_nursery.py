"""The process that workers are forked from: safe to fork, and replaced when it is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from clplat.launchers.nursery import Nursery


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    found = Nursery(threads=1, record=True)
    yield found
    found.close()


def born(nursery: Nursery) -> tuple[socket.socket, int]:
    """A worker's link, and its process id."""
    ours, theirs = socket.socketpair()
    with theirs:
        nursery.start(theirs, {})
    ours.settimeout(300)
    kind, pid = json.loads(ours.recv(1000))
    assert kind == "ready"
    return ours, pid


def test_it_has_one_thread_and_tells_how_its_workers_ended_and_is_replaced_when_it_is_lost(nursery: Nursery) -> None:
    (first, leaves), (second, dies) = born(nursery), born(nursery)
    threads = list(Path(f"/proc/{nursery._process.pid}/task").iterdir())
    assert len(threads) == 1, "a lock that another thread holds would be held for ever in a fork"
    first.close()
    os.kill(dies, signal.SIGKILL)
    assert (nursery.code(leaves), nursery.code(dies)) == (0, -signal.SIGKILL)
    second.close()
    lost = nursery._process.pid
    os.kill(lost, signal.SIGKILL)
    nursery._process.wait()
    third, pid = born(nursery)
    third.close()
    assert nursery._process.pid != lost and nursery.code(pid) == 0 and nursery.code(1) is None
