"""What is asked of Slurm's commands, and what is made of their answers; a Slurm that is a folder stands in for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
import yaml
from rich.console import Console
from studies import assert_same, everything, run_folder, study

from clplat.errors import ClplatError, ConfigError
from clplat.execution import execute
from clplat.journal import last_status, read
from clplat.launch import launch
from clplat.launchers import post, slurm
from clplat.launchers.options import LauncherConfig, SlurmConfig
from clplat.launchers.slurm import SlurmArrays
from clplat.lease import holder
from clplat.study import lay_out, run_study
from clplat.study_file import expand, load_study


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the fake Slurm, whose commands are on the PATH."""
    fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "fake"))
    (tmp_path / "fake").mkdir()
    return tmp_path / "fake"


def config(**changes: object) -> LauncherConfig:
    return LauncherConfig(kind="slurm", slurm=SlurmConfig(poll_seconds=0.1, **changes))


@pytest.mark.long
def test_an_array_carries_out_a_study_and_a_killed_task_is_submitted_again(state: Path) -> None:
    """One test for all of it: each job is a process that imports everything anew."""
    data = study(seeds=[0, 1], training__budget={"steps": 150}, launcher={"kind": "slurm"})
    Path("study.yaml").write_text(yaml.safe_dump(data | {"launcher": {"kind": "slurm", "slurm": {"poll_seconds": 1}}}))
    process = subprocess.Popen([sys.executable, "-P", "-m", "clplat", "run", "study.yaml"])
    killed, deadline = None, time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < deadline
        if killed is None and (found := list(Path("runs").glob("*/digits-s1/checkpoints/*-train-*.pt"))):
            killed = found[0].parents[1]
            os.kill(holder(killed).pid, signal.SIGKILL)
        time.sleep(0.05)
    assert process.returncode == 0 and killed is not None
    assert sorted(path.name for path in state.glob("*.array")) == ["1.array", "2.array"]
    assert [e["status"] for e in read(killed) if e["kind"] == "status"] == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    for seed in (0, 1):
        alone = run_folder(state, data | {"seeds": [seed]}, f"alone{seed}")
        execute(alone)
        assert_same(everything(alone), everything(killed.parent / f"digits-s{seed}"))
    assert not any((killed.parent / f"digits-s{seed}" / post.FOLDER).exists() for seed in (0, 1))


def laid_out() -> list[Path]:
    loaded = load_study(study(seeds=[0, 1]))
    folder = lay_out(loaded, expand(loaded))
    return [folder / "digits-s0", folder / "digits-s1"]


def queued(state: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    """Jobs that never start: the queue says what a test wants it to say."""
    monkeypatch.setattr(slurm, "_queue", lambda: dict(said))
    command = slurm._command
    monkeypatch.setattr(slurm, "_command", lambda *words: "7\n" if words[0] == "sbatch" else command(*words))


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("OUT_OF_MEMORY", "FAILED", "give it more: launcher.slurm.memory"),
        ("TIMEOUT", "FAILED", "give it more: launcher.slurm.time"),
        ("NODE_FAIL", "FAILED", "ended (NODE_FAIL) without a word; it printed"),
        ("CANCELLED", "KILLED", "ended (CANCELLED)"),
    ],
)
def test_a_job_that_slurm_ended_has_a_true_status_and_its_reason(
    state: Path, monkeypatch: pytest.MonkeyPatch, word: str, status: str, said: str
) -> None:
    runs = laid_out()
    (runs[0] / "journal.jsonl").write_text('{"t": 1, "kind": "status", "status": "RUNNING", "reason": ""}\n')
    queued(state, monkeypatch, {"7_0": word})
    (outcome,) = launch(runs[:1], launcher=SlurmArrays(config()), console=Console(quiet=True), retries=0)
    assert outcome.status == last_status(runs[0]) == status
    assert said in outcome.reason and "`clplat resume" in outcome.reason


def test_jobs_that_are_still_in_the_queue_are_taken_up_and_not_submitted_again(state: Path, monkeypatch) -> None:
    runs = laid_out()
    post.expect(runs[0], asks=False)
    post.expect_job(runs[0], "3_0")
    post.expect(runs[1], asks=False)
    post.expect_job(runs[1], "3_1")
    queued(state, monkeypatch, {"3_0": "PENDING", "3_1": "COMPLETED", "7_0": "PENDING"})
    jobs = slurm._Jobs(config(), at_once=None)
    jobs.submit(runs, asks=False)
    assert jobs._jobs == {runs[0]: "3_0", runs[1]: "7_0"} and jobs.ended() == {}
    (script,) = (runs[0].parent / "slurm").glob("*.sh")
    assert "seeds=(1)\n" in script.read_text()


def test_a_job_that_one_look_at_the_queue_lacks_is_not_lost_yet(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = laid_out()
    queued(state, monkeypatch, {})
    jobs = slurm._Jobs(config(), at_once=None)
    jobs.submit(runs, asks=False)
    assert jobs.ended() == {} and set(jobs.ended()) == set(runs)


def test_what_sbatch_complains_of_is_said(state: Path) -> None:
    with pytest.raises(ClplatError, match="sbatch refused .*invalid option or partition nowhere"):
        launch(laid_out(), launcher=SlurmArrays(config(partition="nowhere")), console=Console(quiet=True))


def test_a_controller_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\necho x >> {asked}\n[ $(wc -l < {asked}) -gt 2 ] && echo '5_0|RUNNING' && exit 0\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0.0)
    assert slurm._queue() == {"5_0": "RUNNING"}


def test_where_no_cluster_answers_a_study_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    fake_slurm.install(tmp_path / "bin")
    (tmp_path / "bin" / "squeue").write_text(
        "#!/bin/sh\necho 'squeue: error: DNS SRV lookup failed' >&2\n"
        "echo 'squeue: fatal: Could not establish a source' >&2\nexit 1\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"no Slurm answers here \(.*DNS SRV lookup failed; fatal: .*kind local"):
        run_study(load_study(study(launcher={"kind": "slurm"})), Console(quiet=True))
    assert not (tmp_path / "runs").exists()
