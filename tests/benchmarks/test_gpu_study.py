"""A study packed into one archive: what is wrong is said before any run, and an old archive is not lost to it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import yaml
from studies import study

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_study.py"


def packed(*options: str) -> subprocess.CompletedProcess[str]:
    Path("s.yaml").write_text(yaml.safe_dump(study()))
    command = [sys.executable, "-P", str(SCRIPT), "s.yaml", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_run_folders_are_packed_without_checkpoints_wherever_they_lie() -> None:
    done = packed("--archive", "a.tgz", "--folder", "elsewhere")
    assert done.returncode == 0, done.stderr
    with tarfile.open("a.tgz") as file:
        names = file.getnames()
    assert any(name.startswith("elsewhere/digits-") and name.endswith("journal.jsonl") for name in names)
    assert not any("checkpoints" in name for name in names) and not Path("a.tgz.part").exists()
    assert "not finished" not in done.stdout


def test_runs_that_did_not_finish_are_named_beside_the_archive() -> None:
    done = packed("--training.optimizer.init_args.lr", "1e30")
    assert done.returncode == 1 and "has not finished: digits-s0 FAILED" in done.stdout


def test_what_cannot_be_run_or_written_is_said_first_and_leaves_an_old_archive_alone() -> None:
    Path("results.tgz").write_bytes(b"old")
    for options, message in (
        (("--seed", "3"), "seed: there is no such key; did you mean 'seeds'?"),
        (("--per-card", "0"), "--per-card must be at least 1"),
        (("--archive", "no/such/a.tgz"), "--archive: no/such/a.tgz cannot be written"),
        (("--stream.init_args.num_tasks", "4"), "no run was begun"),
    ):
        done = packed(*options)
        assert done.returncode and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert Path("results.tgz").read_bytes() == b"old" and not Path("runs").exists()
