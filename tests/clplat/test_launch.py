"""Workers of a study: stopped while they start, and lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from studies import run_folder, study

from clplat.journal import last_status
from clplat.launch import launch, most_devices, worker_count
from clplat.launchers.local import Local, _gpus_of
from clplat.study import lay_out
from clplat.study_file import expand, load_study, run_folders


@pytest.mark.parametrize(
    ("number", "to", "moment"),
    [
        # As a terminal does: to the whole group. A scheduler, or a person's `kill`, tells the first process alone.
        (signal.SIGINT, os.killpg, "workers start"),
        (signal.SIGINT, os.killpg, "workers train"),
        (signal.SIGINT, os.kill, "workers train"),
        (signal.SIGTERM, os.kill, "workers start"),
        (signal.SIGTERM, os.kill, "workers train"),
    ],
)
def test_a_stop_at_any_moment_leaves_no_run_failed(
    tmp_path: Path, number: int, to: Callable[[int, int], None], moment: str
) -> None:
    config = load_study(study(seeds=[0, 1], launcher={"workers": 2}, training__budget={"steps": 100_000}))
    folder = lay_out(config, expand(config))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "clplat", "resume", str(folder)], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(process, folder, moment)
        to(process.pid, number)
        look(process, folder, {signal.SIGINT: 130, signal.SIGTERM: 75}[number], moment)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], folder: Path, moment: str) -> None:
    runs, deadline = run_folders(folder), time.monotonic() + 120
    while not (children(process.pid) if moment == "workers start" else all(map(trains, runs))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def look(process: subprocess.Popen[str], folder: Path, code: int, moment: str) -> None:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said and "FAILED" not in said, said
    assert {last_status(run) for run in run_folders(folder)} <= {"KILLED", "WAITING"}
    assert moment == "workers start" or all((run / "checkpoints").is_dir() for run in run_folders(folder))


def children(pid: int) -> list[str]:
    """Worker processes that have been started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in found if "clplat.launchers.local" in Path(f"/proc/{child}/cmdline").read_text()]


def trains(run: Path) -> bool:
    return (run / "journal.jsonl").is_file() and "train/loss" in (run / "journal.jsonl").read_text()


def test_a_stop_that_comes_while_a_worker_is_being_made_gives_it_no_run(tmp_path: Path, monkeypatch) -> None:
    """The handler cannot know a process that has just been made: nobody would ever stop its run."""
    data = study(seeds=[0, 1], training__budget={"steps": 100_000})
    runs = [run_folder(tmp_path, data, name) for name in ("one", "two")]
    made = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return made(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    outcomes = launch(runs, launcher=Local(workers=2, threads=1), console=Console(quiet=True))
    assert [(outcome.folder, outcome.status, outcome.code) for outcome in outcomes] == [(r, "KILLED", 75) for r in runs]
    assert not any((run / "journal.jsonl").exists() for run in runs)


@pytest.mark.parametrize(
    ("devices", "visible", "given"),
    [
        (1, None, ["0", "1", "2", "3", "0"]),
        (2, None, ["0,1", "2,3", "0,1", "2,3", "0,1"]),
        (2, "7,5,3,1", ["7,5", "3,1", "7,5", "3,1", "7,5"]),
        (3, None, ["0,1,2"] * 5),
        (4, None, ["0,1,2,3"] * 5),
    ],
)
def test_a_worker_sees_as_many_gpus_as_its_runs_have_processes(
    monkeypatch: pytest.MonkeyPatch, devices: int, visible: str | None, given: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [_gpus_of(slot, devices)["CUDA_VISIBLE_DEVICES"] for slot in range(5)] == given


def test_runs_side_by_side_share_the_gpus_as_the_one_with_most_processes_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = study(variants={"one": {}, "two": {"training": {"devices": 2}}}, seeds=[0, 1, 2, 3])
    config = load_study(data)
    runs = [run_folder(tmp_path, data | {"variants": {v: data["variants"][v]}}, v) for v in data["variants"]]
    assert [most_devices(runs[:1]), most_devices(runs), most_devices([])] == [1, 2, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [worker_count(config, 8, devices) for devices in (1, 2, 3, 8)] == [4, 2, 1, 1]
