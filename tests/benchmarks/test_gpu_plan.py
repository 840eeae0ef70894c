"""A plan of several studies: all of it is done, what was stopped goes on, and nothing is given more than a card has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import study

from clplat.journal import last_status
from clplat.study_file import load_study

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_plan.py"


def command(steps: list[dict[str, Any]], *options: str) -> list[str]:
    Path("plan.yaml").write_text(yaml.safe_dump(steps))
    return [sys.executable, str(SCRIPT), "plan.yaml", "--out", "out", "--runs-per-card", "4", *options]


def stopped_when(reached: Callable[[], bool], line: list[str]) -> str:
    """What a plan prints that is told to stop once it has come so far."""
    with Path("printed").open("w") as printed, subprocess.Popen(line, stdout=printed) as plan:
        while not reached() and plan.poll() is None:
            time.sleep(0.2)
        plan.send_signal(signal.SIGTERM)
    assert plan.returncode == 1, Path("printed").read_text()
    return Path("printed").read_text()


def test_a_plan_that_was_stopped_goes_on_and_is_packed_without_checkpoints() -> None:
    Path("s.yaml").write_text(yaml.safe_dump(study(training__budget={"steps": 1_000_000})))
    file = str(Path("s.yaml").resolve())
    short = {"seeds": [0, 1], "training.budget.steps": 4}
    steps: list[dict[str, Any]] = [
        {"name": "long", "study": file, "gib": 2},
        {"name": "two", "study": file, "options": short, "workers": 2, "gib": 1},
        {"name": "script", "command": ["benchmarks/trc2_sizes.py"], "cards": 1},
    ]
    card = command(steps, "--gib", "4", "--archive", "a.tgz")
    printed = stopped_when(lambda: "two ends with exit code 0" in Path("printed").read_text(), card)
    # The script has to wait for a card of its own.
    assert "long is stopped and saved" in printed and "not done: long, script" in printed
    with tarfile.open("a.tgz") as packed:
        names = packed.getnames()
    assert any(name.endswith("journal.jsonl") for name in names) and not any("checkpoints" in name for name in names)

    (run,) = Path("out/long/runs").glob("digits-*/digits-s0")
    assert last_status(run) == "KILLED"
    printed = stopped_when(lambda: last_status(run) == "RUNNING", command(steps[::-1], "--gib", "4"))
    assert "script ends with exit code 0" in printed and "two begins" not in printed and "not done: long" in printed
    assert last_status(run) == "KILLED" and list(run.parents[1].iterdir()) == [run.parent]


def test_a_study_of_which_a_run_fails_is_resumed_once() -> None:
    diverging = {"class_path": "SGD", "init_args": {"lr": 1e30}}
    Path("s.yaml").write_text(yaml.safe_dump(study(training__optimizer=diverging)))
    steps = [{"name": "a", "study": str(Path("s.yaml").resolve()), "gib": 1}]
    done = subprocess.run(command(steps, "--gib", "4"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout.count("a ends with exit code 1") == 2, done.stdout + done.stderr
    assert "not done: a" in done.stdout and len(list(Path("out/a/runs").iterdir())) == 1


def test_what_is_free_of_a_card_is_what_the_drivers_tool_says_of_that_card(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Path("bin/nvidia-smi")
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$@" >> asked; [ "$3" = --id=7 ] && echo 2048 || echo 8192\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent.resolve()}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    done = subprocess.run(command([{"name": "a", "study": "quickstart", "gib": 3}]), capture_output=True, text=True)
    assert done.returncode == 2 and "1 cards of 2 GiB and 4 runs have no room for it" in done.stderr, done.stderr
    assert "--query-gpu=memory.free" in Path("asked").read_text()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"gib": 1}, "a: a step has either a study or a command"),
        ({"study": "quickstart"}, "a: say in gib what a run takes"),
        ({"study": "quickstart", "gib": 3, "workers": 2}, "a: 1 cards of 5 GiB and 4 runs have no room for it"),
        ({"study": "quickstart", "gigabytes": 3}, "unexpected keyword argument 'gigabytes'"),
    ],
)
def test_a_step_that_cannot_be_placed_is_said_before_any_begins(step: dict[str, Any], message: str) -> None:
    done = subprocess.run(command([{"name": "a"} | step], "--gib", "5"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and not Path("out").exists(), done.stderr


@pytest.mark.parametrize("plan", sorted((ROOT / "benchmarks" / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_here_name_studies_and_variants_that_exist(plan: Path) -> None:
    for step in yaml.safe_load(plan.read_text()):
        if "study" in step:
            load_study(step["study"], [(key, json.dumps(value)) for key, value in step.get("options", {}).items()])
        else:
            assert (ROOT / step["command"][0]).is_file()
