#!/usr/bin/env python3
"""A Slurm that is a folder: `sbatch`, `squeue`, `scancel` and `scontrol` as far as clplat calls them.

Linked under these names into a folder on the PATH (`install`). Each task of an array is a process of this machine that
starts at once; a file tells how it ended. Options that clplat does not use are refused, so that the tests hold what is
asked of the real one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ.get("FAKE_SLURM", "."))
KNOWN = (
    "--job-name", "--array", "--output", "--open-mode", "--nodes", "--ntasks", "--cpus-per-task", "--signal",
    "--requeue", "--no-requeue", "--partition", "--account", "--time", "--mem", "--gpus", "--qos",
)  # fmt: skip


def install(folder: Path) -> None:
    """Put the commands into a folder."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        (folder / name).write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -S '{Path(__file__).resolve()}' {name} \"$@\"\n"
        )
        (folder / name).chmod(0o755)


def sbatch(words: list[str]) -> None:
    flag, script = words
    assert flag == "--parsable", flag
    text = Path(script).read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    options = dict(re.findall(r"^#SBATCH (--[\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    refused = [name for name in options if name not in KNOWN]
    if refused or options.get("--partition") == "nowhere":
        sys.exit(f"sbatch: error: invalid option or partition {refused or options['--partition']}")
    STATE.mkdir(exist_ok=True)
    array = 1 + len(list(STATE.glob("*.array")))
    (STATE / f"{array}.array").write_text(text)
    first, last = map(int, options["--array"].partition("%")[0].split("-"))
    for number in range(first, last + 1):
        start(f"{array}_{number}")
    print(array)


def start(job: str) -> None:
    """One task, watched by a process of its own that writes down how it ended."""
    watch = [sys.executable, "-S", str(Path(__file__).resolve()), "watch", job]
    subprocess.Popen(watch, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (STATE / f"{job}.state").write_text("RUNNING")


def watch(job: str) -> None:
    array, _, number = job.partition("_")
    script = STATE / f"{array}.array"
    name = dict(re.findall(r"^#SBATCH (--[\w-]+)=(.*)$", script.read_text(), re.MULTILINE))["--output"]
    environment = os.environ | {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": number}
    with Path(name.replace("%A", array).replace("%a", number)).open("a") as output:
        process = subprocess.Popen(
            ["bash", str(script)], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        (STATE / f"{job}.pid").write_text(str(process.pid))
        code = process.wait()
    if (STATE / f"{job}.state").read_text() == "RUNNING":
        (STATE / f"{job}.state").write_text("COMPLETED" if code == 0 else "FAILED")


def squeue(words: list[str]) -> None:
    assert words == ["--me", "--noheader", "--array", "--states=all", "--format=%i|%T"], words
    for path in sorted(STATE.glob("*.state")):
        print(f"{path.stem}|{path.read_text()}")


def scancel(words: list[str]) -> None:
    options = [word for word in words if word.startswith("-")]
    assert options in ([], ["--signal=KILL", "--full"]), options
    for job in words[len(options) :]:
        if (STATE / f"{job}.state").read_text() == "RUNNING":
            (STATE / f"{job}.state").write_text("CANCELLED")
            os.killpg(int((STATE / f"{job}.pid").read_text()), signal.SIGKILL if options else signal.SIGTERM)


def scontrol(words: list[str]) -> None:
    command, job = words
    assert command == "requeue", command
    (STATE / f"{job}.state").write_text("REQUEUED")
    start(job)
    os.killpg(int((STATE / f"{job}.pid").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "scontrol": scontrol, "watch": lambda w: watch(*w)}[
        sys.argv[1]
    ](sys.argv[2:])
