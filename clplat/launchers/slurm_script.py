"""The batch script of an array of runs: plain text in the study's folder, which a person can read and submit again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from clplat.config import RunConfig
from clplat.interruption import EXIT_REQUEUE
from clplat.launchers.options import LauncherConfig

BODY = """
nearly_over=no
variants=({variants})
seeds=({seeds})
variant=${{variants[$SLURM_ARRAY_TASK_ID]}}
seed=${{seeds[$SLURM_ARRAY_TASK_ID]}}
export OMP_NUM_THREADS={threads}
cd {here}
{setup}
{python} -P -m clplat run {study} --variant "$variant" --seed "$seed" &
run=$!
# Slurm tells this shell alone that the time is nearly over; the run saves itself and ends with code {requeue}.
trap 'nearly_over=yes; kill -USR1 $run' USR1
trap 'kill -TERM $run' TERM
wait $run; code=$?
while [ $code -gt 128 ] && kill -0 $run 2>/dev/null; do wait $run; code=$?; done
"""
AGAIN = """# 138: it was told before it could listen, and has nothing to save.
if [ "$nearly_over" = yes ] && {{ [ $code -eq {requeue} ] || [ $code -eq 138 ]; }}; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
"""


def script(study: Path, runs: Sequence[RunConfig], config: LauncherConfig, *, at_once: int | None) -> str:
    """The text for these runs of the study in the folder `study`, `at_once` of them side by side at most."""
    body = BODY.format(
        variants=" ".join(shlex.quote(run.variant) for run in runs),
        seeds=" ".join(str(run.seed) for run in runs),
        threads=max(run.training.threads for run in runs), here=shlex.quote(os.getcwd()),
        setup="\n".join(config.slurm.setup), python=shlex.quote(sys.executable), study=shlex.quote(str(study)),
        requeue=EXIT_REQUEUE,
    )  # fmt: skip
    again = AGAIN.format(requeue=EXIT_REQUEUE) if config.slurm.requeue else ""
    lines = "".join(f"#SBATCH {option}\n" for option in _options(study, runs, config, at_once))
    return f"#!/bin/bash\n{lines}{body}{again}exit $code\n"


def _options(study: Path, runs: Sequence[RunConfig], config: LauncherConfig, at_once: int | None) -> list[str]:
    slurm, training = config.slurm, [run.training for run in runs]
    cpus = config.cpus or max(t.threads * t.devices + t.workers for t in training)
    on_gpu = max((t.devices for t in training if t.accelerator == "gpu"), default=0)
    gpus = config.gpus if config.gpus is not None else on_gpu
    named = {
        "--partition": slurm.partition, "--account": slurm.account, "--time": slurm.time, "--mem": slurm.memory,
        "--gpus": gpus or None,
    }  # fmt: skip
    return [
        f"--job-name=clplat-{runs[0].study}",
        f"--array=0-{len(runs) - 1}" + (f"%{at_once}" if at_once is not None else ""),
        f"--output={str(study / 'slurm' / '%A_%a.txt')}",
        "--open-mode=append", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}",
        f"--signal=B:USR1@{slurm.signal_seconds}", "--requeue" if slurm.requeue else "--no-requeue",
        *(f"{name}={value}" for name, value in named.items() if value is not None),
        *slurm.extra,
    ]  # fmt: skip
