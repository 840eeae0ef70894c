"""Twenty kills from outside, at random points of the record, in processes of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from studies import EWC, REPLAY, assert_same, everything, run_folder, study

from clplat.journal import last_status, read

pytestmark = pytest.mark.long


def config(workers: int) -> dict[str, Any]:
    return study(
        strategies={"replay": REPLAY, "ewc": EWC},
        training__workers=workers,
        training__budget={"steps": 60},
        evaluation__every=20,
    )


def started(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-P", "-m", "clplat.execution", str(folder)], start_new_session=True)


def entries(folder: Path) -> int:
    """How much the run has written down so far; every step is flushed, since every step is saved."""
    return sum(1 for _ in read(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_runs_killed_at_random_points_and_resumed_equal_the_uninterrupted_one(tmp_path: Path, workers: int) -> None:
    whole = run_folder(tmp_path, config(workers), "whole")
    assert started(whole).wait() == 0
    total, chance, killed = entries(whole), random.Random(workers), 0
    for number in range(10):
        folder, moment = run_folder(tmp_path, config(workers), f"killed{number}"), chance.randint(2, total - 4)
        process = started(folder)
        while entries(folder) < moment and process.poll() is None:
            time.sleep(0.005)
        # The whole session: loader workers die with their run.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += last_status(folder) == "RUNNING"
        process.wait()
        assert started(folder).wait() == 0
        assert last_status(folder) == "FINISHED"
        assert_same(everything(whole), everything(folder))
    assert killed >= 5, "too few runs were under way when they were killed for this to mean anything"
