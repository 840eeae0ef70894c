"""Studies and tunes on a real Ray and Slurm of one node: as serial, whatever is killed; Ctrl-C. `make test-cluster`."""

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
import yaml
from studies import REPLAY, assert_same, everything, study

from clplat.journal import last_status, read
from clplat.lease import holder
from clplat.mlflow_store import client
from clplat.study_file import run_folders

pytestmark = pytest.mark.cluster
LIMIT = 600
ARMS = {"naive": {}, "er": {"strategies": {"replay": REPLAY}}}


def started(data: dict[str, Any], *words: str) -> subprocess.Popen[str]:
    """`clplat run`, or another command on a study that is there."""
    Path("study.yaml").write_text(yaml.safe_dump(data))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "clplat", *(words or ("run", "study.yaml"))], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@contextlib.contextmanager
def running(data: dict[str, Any], *words: str):
    process = started(data, *words)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def until(holds: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + LIMIT
    while not (found := holds()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return found


def saved(name: str) -> Path | None:
    """The folder of a run of this name once it has a checkpoint in the middle of its training."""
    for path in Path("runs").glob(f"*/{name}/checkpoints/*-train-*.pt"):
        return path.parents[1]
    return None


def folder_here() -> Path:
    return next(path for path in Path("runs").iterdir() if (path / "study.yaml").is_file())


def serial(data: dict[str, Any], name: str = "serial") -> Path:
    """The folder of the same study, run one after another by `local`."""
    import clplat

    changed = data | {"launcher": {"workers": 1}, "folder": name}
    return clplat.run(changed, quiet=True).folder


def same_as(expected: Path, folder: Path) -> None:
    for run in run_folders(expected):
        assert last_status(folder / run.name) == "FINISHED"
        assert_same(everything(run), everything(folder / run.name))


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == code and "Traceback" not in said, said
    return said


def test_a_study_gives_what_it_gives_serially_and_mlflow_has_all_of_it(launcher: dict[str, Any]) -> None:
    data = study(variants=ARMS, seeds=[0, 1], launcher=launcher, tracking__enabled=True)
    with running(data) as process:
        finished(process)
    same_as(serial(data), folder_here())
    connection = client(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    found = connection.search_runs([e.experiment_id for e in connection.search_experiments()])
    names = [run.info.run_name for run in found if run.data.tags.get("study_run") == folder_here().name]
    assert sorted(names) == sorted([folder_here().name, "er-s0", "er-s1", "naive-s0", "naive-s1"])
    assert {run.info.status for run in found} == {"FINISHED"}


def test_a_killed_worker_s_run_goes_on_and_what_had_finished_is_untouched(launcher: dict[str, Any]) -> None:
    data = study(variants={"short": {"training": {"budget": {"steps": 2}}}, "long": {}}, launcher=launcher,
                 training__budget={"steps": 250})  # fmt: skip
    with running(data) as process:
        until(lambda: saved("long-s0") and last_status(folder_here() / "short-s0") == "FINISHED", process)
        before = (folder_here() / "short-s0" / "journal.jsonl").read_bytes()
        os.kill(holder(folder_here() / "long-s0").pid, signal.SIGKILL)
        said = finished(process)
    assert "long-s0: its" in said and "it goes on from what was saved" in said
    statuses = [e["status"] for e in read(folder_here() / "long-s0") if e["kind"] == "status"]
    assert statuses == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    assert (folder_here() / "short-s0" / "journal.jsonl").read_bytes() == before
    same_as(serial(data), folder_here())


def test_without_retries_a_killed_worker_s_run_is_failed_and_resume_goes_on(launcher: dict[str, Any]) -> None:
    data = study(launcher=launcher | {"retries": 0}, training__budget={"steps": 250})
    with running(data) as process:
        run = until(lambda: saved("digits-s0"), process)
        os.kill(holder(run).pid, signal.SIGKILL)
        said = finished(process, code=1)
    assert last_status(run) == "FAILED" and "FAILED. its" in said and "`clplat resume" in said
    with running(data, "resume", str(folder_here())) as process:
        finished(process)
    same_as(serial(data), folder_here())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stop_stops_all_which_save_themselves(launcher: dict[str, Any], number: int, code: int) -> None:
    data = study(seeds=[0, 1, 2], launcher=launcher, training__budget={"steps": 250})
    with running(data) as process:
        until(lambda: saved("digits-s0") and saved("digits-s1"), process)
        pids = [holder(folder_here() / name).pid for name in ("digits-s0", "digits-s1")]
        # As a terminal does: to the whole group. A scheduler tells the first process alone.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = finished(process, code=code)
    stands = [last_status(run) for run in run_folders(folder_here())]
    assert stands == ["KILLED", "KILLED", "WAITING"] and "FAILED" not in said, said
    assert "`clplat resume" in said
    assert not any(is_clplat(pid) for pid in pids)
    if launcher["kind"] == "slurm":
        asked = ["squeue", "--me", "--noheader", "--array"]
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == ""
    with running(data, "resume", str(folder_here())) as process:
        finished(process)
    same_as(serial(data), folder_here())


def is_clplat(pid: int) -> bool:
    try:
        return b"clplat" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_tune_asks_its_trials_at_their_boundaries(launcher: dict[str, Any]) -> None:
    from searches import tune_study

    data = tune_study(tune__trials=8, tune__prune_after=2, stream__init_args__num_tasks=5, seeds=[0],
                      stream__init_args__class_order=list(range(10)), launcher=launcher)  # fmt: skip
    with running(data, "tune", "study.yaml") as process:
        finished(process)
    (folder,) = Path("runs").glob("*-tune-*")
    stands = [last_status(run) for run in run_folders(folder)]
    assert len(stands) == 8 and "PRUNED" in stands and set(stands) <= {"FINISHED", "PRUNED"}


@pytest.fixture
def on_slurm(slurm: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SLURM_CONF", slurm)
    return {"kind": "slurm", "slurm": {"poll_seconds": 1}}


def test_a_run_whose_time_is_nearly_over_saves_itself_and_is_queued_again(on_slurm: dict[str, Any]) -> None:
    data = study(launcher=on_slurm, training__budget={"steps": 250})
    with running(data) as process:
        run = until(lambda: saved("digits-s0"), process)
        array = (run / "job" / "expected.json").read_text()
        job = array.partition('"job": "')[2].partition('"')[0]
        # What Slurm sends before the end of the time limit, to the shell of the batch script.
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
        finished(process)
    statuses = [e["status"] for e in read(run) if e["kind"] == "status"]
    assert statuses == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert len(list((folder_here() / "slurm").glob("*.sh"))) == 1, "it was queued again, not submitted again"
    same_as(serial(data), folder_here())


def test_jobs_outlive_the_process_that_submitted_them_and_resume_takes_them_up(on_slurm: dict[str, Any]) -> None:
    data = study(seeds=[0, 1, 2], launcher=on_slurm, training__budget={"steps": 250})
    with running(data) as process:
        until(lambda: saved("digits-s0"), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with running(data, "resume", str(folder_here())) as process:
        finished(process)
    assert len(list((folder_here() / "slurm").glob("*.sh"))) == 1, "no run was submitted twice"
    statuses = [[e["status"] for e in read(run) if e["kind"] == "status"] for run in run_folders(folder_here())]
    assert statuses == [["RUNNING", "FINISHED"]] * 3
    same_as(serial(data), folder_here())


def test_what_slurm_refuses_is_said_and_nothing_is_lost(on_slurm: dict[str, Any]) -> None:
    data = study(launcher=on_slurm | {"slurm": {"partition": "nowhere"}})
    with running(data) as process:
        said = finished(process, code=1)
    assert "sbatch refused" in said and "nowhere" in said or "partition" in said
    assert last_status(folder_here() / "digits-s0") == "WAITING"
