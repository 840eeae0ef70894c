"""A study on the cards of one machine, several runs side by side on each, packed into one archive at the end.

    python benchmarks/gpu_study.py c4_wikitext_gsm8k_gpu --per-card 7 --minutes 20 [--archive FILE] [--key value ...]

Small models leave most of a card idle: several runs share it. When the minutes are over the study is stopped as by
Ctrl-C, which saves every run, and what there is gets packed: MLflow's database and artifacts, and the run folders with
their journals, tables and figures. `--checkpoints` packs these too, to resume elsewhere.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """The study as a process of its own, stopped when its time is over; its exit code."""
    workers = options.per_card * max(1, torch.cuda.device_count())
    command = [sys.executable, "-P", "-m", "clplat", "run", options.study, "--launcher.workers", str(workers), *rest]
    process = subprocess.Popen(command)
    try:
        return process.wait(options.minutes * 60 if options.minutes else None)
    except subprocess.TimeoutExpired:
        print(f"{options.minutes:g} minutes are over: the study is stopped and saved", flush=True)
        # A terminal would tell every process; the launcher tells its workers of a SIGTERM.
        process.send_signal(signal.SIGTERM)
        return process.wait()


def pack(archive: Path, *, checkpoints: bool) -> None:
    """MLflow's files and the run folders in one archive."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return entry if checkpoints or "/checkpoints" not in entry.name else None

    with tarfile.open(archive, "w:gz") as file:
        for name in ("mlflow.db", "mlartifacts", "runs"):
            if Path(name).exists():
                file.add(name, filter=wanted)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--per-card", type=int, default=4, help="runs side by side on one card")
    parser.add_argument("--minutes", type=float, help="stop and save after so long")
    parser.add_argument("--archive", type=Path, default=Path("results.tgz"))
    parser.add_argument("--checkpoints", action="store_true")
    options, rest = parser.parse_known_args()
    start = time.perf_counter()
    code = run(options, rest)
    pack(options.archive, checkpoints=options.checkpoints)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    sys.exit(code)


if __name__ == "__main__":
    main()
