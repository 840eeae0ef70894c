"""A study on the cards of one machine, several runs side by side on each, packed into one archive at the end.

    python benchmarks/gpu_study.py c4_wikitext_gsm8k_gpu --per-card 7 --minutes 20 [--archive FILE] [--key value ...]

Small models leave most of a card idle: several runs share it. When the minutes are over the study is stopped as by
Ctrl-C, which saves every run, and what there is gets packed: MLflow's database and artifacts, and the run folders with
their journals, tables and figures. `--checkpoints` packs these too, to resume elsewhere. Unfinished runs are named.
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

from clplat.cli import dotted
from clplat.errors import ClplatError
from clplat.journal import last_status
from clplat.study_file import load_study, run_folders


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


def begun(folder: Path) -> set[Path]:
    """The studies in the folder of runs."""
    return {file.parent for file in folder.glob("*/study.yaml")}


def unfinished(study: Path) -> list[str]:
    """The runs of a study that have not finished, and how they stand."""
    found = {run.name: last_status(run) for run in run_folders(study)}
    return [f"{name} {status}" for name, status in found.items() if status != "FINISHED"]


def pack(archive: Path, folder: Path, *, checkpoints: bool) -> None:
    """MLflow's files and the run folders in one archive, which takes its place when it is whole."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return entry if checkpoints or "/checkpoints" not in entry.name else None

    part = archive.with_name(f"{archive.name}.part")
    with tarfile.open(part, "w:gz") as file:
        for name in ("mlflow.db", "mlartifacts", str(folder)):
            if Path(name).exists():
                file.add(name, filter=wanted)
    part.replace(archive)
    print(f"{archive}: {archive.stat().st_size / 2**20:.2f} MiB", flush=True)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: list[str]) -> Path:
    """The study's folder of runs; what is wrong with the study, the numbers or the archive is said before any work."""
    if options.per_card < 1 or (options.minutes is not None and options.minutes <= 0):
        parser.error("--per-card must be at least 1, and --minutes more than 0")
    try:
        folder = Path(load_study(options.study, dotted(rest, parser, allowed=True)).folder)
        options.archive.with_name(f"{options.archive.name}.part").open("wb").close()
    except ClplatError as error:
        sys.exit(f"{parser.prog}: {error}")
    except OSError as error:
        sys.exit(f"--archive: {options.archive} cannot be written ({error.strerror}); name another place")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--per-card", type=int, default=4, help="runs side by side on one card")
    parser.add_argument("--minutes", type=float, help="stop and save after so long")
    parser.add_argument("--archive", type=Path, default=Path("results.tgz"))
    parser.add_argument("--checkpoints", action="store_true")
    options, rest = parser.parse_known_args()
    folder = check(parser, options, rest)
    start, before = time.perf_counter(), begun(folder)
    code = run(options, rest)
    new = begun(folder) - before
    if not new:
        options.archive.with_name(f"{options.archive.name}.part").unlink()
        sys.exit(f"no run was begun: {options.archive} is not written")
    pack(options.archive, folder, checkpoints=options.checkpoints)
    for study in new:
        if left := unfinished(study):
            print(f"{study.name} has not finished: {', '.join(left)}")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    sys.exit(code)


if __name__ == "__main__":
    main()
