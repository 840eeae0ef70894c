"""What breaks around a study: a disk that is really full, a server that is really killed, a port that is taken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_disk import confined
from studies import REPLAY, study

import clplat
from clplat.cli import main
from clplat.journal import last_status, read, table
from clplat.mlflow_store import client
from clplat.study_results import load_study_results


def on_a_small_disk(where: str, kib: int) -> dict[str, Any]:
    done = subprocess.run(confined(where, kib), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_disk_that_is_really_full_fails_a_run_with_what_to_do_and_loses_nothing(tmp_path: Path) -> None:
    found = on_a_small_disk("runs", 220)
    (first, *_), (second, cause, reason) = found["outcomes"]
    assert first == "FINISHED" and second == "FAILED" and cause == "storage"
    assert "Free some space" in reason and "clplat resume" in reason
    # The status is written by the room that was kept for it, and the report says what it lacks instead of falling over.
    assert found["then"] == {"naive-s0": "FINISHED", "er-s0": "FAILED"}
    assert "When the disk has room, `clplat resume" in found["said"] and "will fail again" not in found["said"]
    assert found["now"] == {"naive-s0": "FINISHED", "er-s0": "FINISHED"}
    replay = {"class_path": "ExperienceReplay", "init_args": {"capacity": 200}}
    whole = clplat.run(study(variants={"er": {"strategies": {"replay": replay}}}), quiet=True)
    assert str(found["table"]) == str(json.loads(json.dumps(table(whole.folder / "er-s0").to_rows())))


@pytest.mark.long
@pytest.mark.parametrize(("where", "kib", "second"), [("database", 1125, "FINISHED"), ("both", 1240, "FAILED")])
def test_a_full_disk_under_mlflow_stops_no_run_and_its_record_is_whole_in_the_end(
    where: str, kib: int, second: str
) -> None:
    found = on_a_small_disk(where, kib)
    assert found["outcomes"][0][0] == "FINISHED" and found["outcomes"][1][0] == second
    assert "full" in found["unsent"] and "clplat sync" in found["said"] and "sqlalche.me" not in found["said"]
    assert set(found["now"].values()) == {"FINISHED"}
    # A reason of before does not stand beside a run that has finished after all.
    for status, reason, metrics in found["held"].values():
        assert status == "FINISHED" and reason == "" and metrics > 20


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server(port: int, database: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real `mlflow server`, killed outright at the end with all its processes."""
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.parent / "files")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (database.parent / f"server-{time.monotonic_ns()}.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not answers(port):
                assert process.poll() is None and time.monotonic() < deadline, "mlflow server does not start"
                time.sleep(0.2)
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


WAITS = """
import pathlib, time
from clplat.strategies.base import Strategy
class Waits(Strategy):
    def __init__(self, *, file: str) -> None:
        self.file = pathlib.Path(file)
    def task_end(self, task):
        deadline = time.monotonic() + 120
        while task.index == 1 and not self.file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
"""


def waiting(file: str) -> dict[str, Any]:
    """A strategy that ends its second task when there is such a file."""
    return {"wait": {"class_path": "waits.Waits", "init_args": {"file": file}}}


def wait_for(pattern: str, place: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(place.glob(pattern)):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.1)


@pytest.mark.long
def test_a_server_that_is_killed_and_started_again_during_a_study_has_the_whole_record_in_the_end(
    tmp_path: Path,
) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    port, database = free_port(), tmp_path / "server.db"
    data = study(
        variants={"a": {"strategies": waiting("killed")},
                  "b": {"strategies": {"replay": REPLAY} | waiting("back")}, "c": {}},
        launcher={"workers": 1},
        tracking={"enabled": True, "uri": f"http://127.0.0.1:{port}", "log_every": 1, "system_metrics": False},
    )  # fmt: skip
    ended: list[Any] = []
    with server(port, database):
        carried = threading.Thread(target=lambda: ended.append(clplat.run(data, quiet=True)))
        carried.start()
        wait_for("runs/*/a-s0/mlflow.json", tmp_path)
    # Killed while run a is under way; away while it ends and b begins.
    (tmp_path / "killed").touch()
    wait_for("runs/*/b-s0/journal.jsonl", tmp_path)
    with server(port, database):
        (tmp_path / "back").touch()
        carried.join(180)
        (done,) = ended
        assert [outcome.status for outcome in done.outcomes] == ["FINISHED"] * 3 and not done.unsent
        held = load_study_results(str(done.folder))
        assert [run.status for run in held.runs] == ["FINISHED"] * 3
        assert client(held.uri).get_run(held.run_id).info.status == "FINISHED"
        for run in held.runs:
            folder = done.folder / f"{run.variant}-s0"
            assert run.table is not None and str(run.table.to_rows()) == str(table(folder).to_rows())
            written = [(entry["step"], entry["values"]["train/loss"]) for entry in read(folder)
                       if entry["kind"] == "metric" and "train/loss" in entry["values"]]  # fmt: skip
            points = client(held.uri).get_metric_history(run.run_id, "train/loss")
            assert sorted((point.step, point.value) for point in points) == sorted(written)


def test_a_port_that_is_taken_is_refused_with_one_that_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main(["ui", "--port", str(port)])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and f"--port: {port} is in use" in said
    other = int(said.split("clplat ui --uri sqlite:///mlflow.db --port ")[1].split("`")[0])
    assert other != port
    with pytest.raises(SystemExit) as ended:
        main(["ui", "--port", "70000"])
    assert ended.value.code == 1 and "--port: 70000 cannot be had" in capsys.readouterr().err


KILLED = """
import os, pathlib, signal
from clplat.strategies.base import Strategy
class Killed(Strategy):
    def task_end(self, task):
        if task.index == 1 and not pathlib.Path("killed").exists():
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


CROWDED = """
import pathlib, torch
from clplat.strategies.base import Strategy
class Crowded(Strategy):
    def task_end(self, task):
        if task.index == 1 and not pathlib.Path("room").exists():
            raise torch.OutOfMemoryError("CUDA out of memory")
"""


def test_a_run_that_finds_its_device_full_is_not_told_that_it_will_fail_again_and_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crowding.py").write_text(CROWDED)
    data = study(strategies={"crowded": {"class_path": "crowding.Crowded"}})
    Path("s.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SystemExit):
        main(["run", "s.yaml"])
    said = " ".join(capsys.readouterr().out.split())
    (folder,) = Path("runs").iterdir()
    assert "CUDA out of memory" in said and "will fail again" not in said and "When the disk" not in said
    assert f"Where others had it, `clplat resume {folder}` goes on once they have ended" in said
    Path("room").touch()
    assert clplat.resume(folder).status == "FINISHED"


@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_worker_that_is_killed_takes_its_own_run_alone_which_goes_on_later_to_the_same_result(
    tracked: bool, tmp_path: Path
) -> None:
    (tmp_path / "killing.py").write_text(KILLED)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    data = study(
        variants={"a": {"strategies": {"killed": {"class_path": "killing.Killed"}}}, "b": {}, "c": {}},
        launcher={"workers": 2, "retries": 0},
        tracking={"enabled": tracked, "uri": uri, "log_every": 5, "system_metrics": False},
    )  # fmt: skip
    done = clplat.run(data, quiet=True)
    first, *others = done.outcomes
    assert [outcome.status for outcome in others] == ["FINISHED"] * 2
    assert (first.status, first.cause) == ("FAILED", "process")
    assert "its process died (exit code -9); `clplat resume" in first.reason
    assert last_status(first.folder) == "FAILED"
    if tracked:
        held = {run.variant: run for run in load_study_results(str(done.folder)).runs}
        assert {v: run.status for v, run in held.items()} == {"a": "FAILED", "b": "FINISHED", "c": "FINISHED"}
        assert held["a"].tags["status_reason"] == first.reason
    assert clplat.resume(done.folder).status == "FINISHED"
    # b has the same configuration and seed but for the strategy that kills.
    assert str(table(first.folder).to_rows()) == str(table(others[0].folder).to_rows())
    if tracked:
        held = {run.variant: run for run in load_study_results(str(done.folder)).runs}
        assert {run.status for run in held.values()} == {"FINISHED"} and held["a"].tags["status_reason"] == ""
