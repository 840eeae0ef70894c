"""How much faster a study of small runs is with two processes than with one: `kind: local`, split digits.

    OMP_NUM_THREADS=1 python benchmarks/launchers.py [--runs 8] [--epochs 450] [--repeats 3] [--kinds local]

The whole command is timed, as a person waits for it: checks, runs, the record in MLflow (SQLite), comparison and
report. Serial and parallel take turns. `runs` says how long one run took on the machine alone; CPU seconds beside the
clock's show whether other work was in the way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clplat.journal import read
from clplat.study_file import run_folders


def study(runs: int, epochs: int) -> dict:
    """Replay on five tasks of real digits, a seed for each run."""
    return {
        "name": "launchers",
        "stream": {"class_path": "SplitDigits", "init_args": {"num_tasks": 5}},
        "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [128, 128]}},
        "strategies": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 100}}},
        "training": {
            "budget": {"epochs": epochs},
            "batch_size": 32,
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.02, "momentum": 0.9}},
        },
        "seeds": list(range(runs)),
    }


def timed(data: dict, kind: str, workers: int) -> tuple[float, float, list[float]]:
    """Seconds by the clock and of all CPUs for one study, and the seconds of each of its runs."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "study.yaml").write_text(json.dumps(data))
        command = [sys.executable, "-P", "-m", "clplat", "run", "study.yaml"]
        command += ["--launcher.kind", kind, "--launcher.workers", str(workers)]
        before, start = sum(os.times()[2:4]), time.perf_counter()
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        clock, cpu = time.perf_counter() - start, sum(os.times()[2:4]) - before
        (folder,) = (Path(place) / "runs").iterdir()
        moments = [[int(e["t"]) for e in read(run) if e["kind"] == "status"] for run in run_folders(folder)]
    return clock, cpu, [(last - first) / 1000 for first, last in moments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=450)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["local"], help="local, ray, slurm")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data = study(options.runs, options.epochs)
    print(f"{options.runs} runs, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}, load {os.getloadavg()[0]:.1f}")
    ratios: dict[str, list[float]] = {kind: [] for kind in options.kinds}
    for _ in range(options.repeats):
        serial, cpu, runs = timed(data, "local", 1)
        print(
            f"serial            {serial:6.1f} s, CPU {cpu:6.1f} s, runs {min(runs):.1f}-{max(runs):.1f} s", flush=True
        )
        for kind in options.kinds:
            clock, cpu, runs = timed(data, kind, 2)
            ratios[kind].append(serial / clock)
            print(
                f"{kind:5} 2 processes {clock:6.1f} s, CPU {cpu:6.1f} s, runs {min(runs):.1f}-{max(runs):.1f} s, "
                f"ratio {serial / clock:.2f}, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    for kind, found in ratios.items():
        print(f"{kind}: {statistics.median(found):.2f} times serial (median of {len(found)})")


if __name__ == "__main__":
    main()
