"""All rows that are compared with published numbers: every seed a run of its own, as many side by side as fit.

    python benchmarks/published_rows.py --plan                                   # rows, runs and estimated minutes
    python benchmarks/published_rows.py --jobs 16 --gpu-jobs 6 --minutes 18 --out published
    python benchmarks/published_rows.py --rows 'split_mnist_*' --jobs 2 --steps 5 --out try

Rows are the names of `clplat run --best`. Runs have one thread each. Those whose study does not ask for the CPU share
the GPU, `--gpu-jobs` at a time; at 0 they run on the CPU too. No run is begun that would not end in time by its
estimate; those that still run when the minutes are over are stopped and saved. The same command again goes on with what
is left. There is nothing but run folders to it, no MLflow: OUT/rows.csv has every seed's final score, OUT/rows.md the
table of `published_page.py`, and OUT.tgz the folders without checkpoints.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fnmatch
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from published_page import rows, table

from clplat import best
from clplat.config import StudyConfig, plain, save
from clplat.errors import ClplatError
from clplat.journal import last_status
from clplat.study import lay_out_runs, settled
from clplat.study_file import expand, load_study

STARTUP = 10.0
"""Seconds of a run before its first step and after its last, on top of what the study's entry says."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One seed of one row."""

    folder: Path
    seconds: float
    on_gpu: bool


def order(names: Sequence[str]) -> list[str]:
    """Numbers that were read in their source before those that were recalled, and the longest runs first."""
    entries = {name: entry for name, (_, entry) in best.catalogue().items() if name in names}
    return sorted(entries, key=lambda name: (entries[name].recalled, -entries[name].minutes))


def wanted(name: str, options: argparse.Namespace) -> StudyConfig:
    """The study of one row, without MLflow; `--seeds` and `--steps` make it smaller."""
    changes = [("tracking.enabled", "false"), ("folder", str(options.out))]
    if options.seeds:
        changes.append(("seeds", str(options.seeds)))
    if not options.gpu_jobs:
        changes.append(("training.accelerator", "cpu"))
    study = settled(best.study(name, changes))
    if options.steps:
        (variant, keys), = study.variants.items()  # fmt: skip
        training = (keys.get("training") or {}) | {"budget": {"steps": options.steps}}
        study = dataclasses.replace(study, variants={variant: keys | {"training": training}})
    return study


def settings(study: StudyConfig) -> dict[str, Any]:
    """What decides a row's numbers: neither where its folder lies, nor MLflow, which it does without."""
    return {key: value for key, value in plain(study).items() if key not in ("folder", "tracking")}


def laid_out(name: str, options: argparse.Namespace) -> list[Job]:
    """The folders of a row, made where they are not there; its runs that have not finished."""
    study, folder = wanted(name, options), options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    if file.is_file() and settings(load_study(file)) != settings(study):
        raise ClplatError(f"{file}: this folder holds the row with other settings; name another --out")
    save(study, file)
    runs = expand(study)
    lay_out_runs(folder, runs)
    seconds = STARTUP + 60 * study.known_good[name].minutes
    return [
        Job(folder=place, seconds=seconds, on_gpu=run.training.accelerator != "cpu")
        for run in runs
        if last_status(place := folder / f"{run.variant}-s{run.seed}") != "FINISHED"
    ]


def work(folder: Path) -> None:
    """One run in a process of its own."""
    from clplat.execution import execute

    outcome = execute(folder)
    if outcome.status != "FINISHED":
        print(f"{folder}: {outcome.status}. {outcome.reason}", flush=True)
    sys.exit(outcome.code)


class Pool:
    """Keeps so many processes busy until all is done or the time is over."""

    def __init__(self, jobs: Sequence[Job], options: argparse.Namespace) -> None:
        self.waiting, self.options = list(jobs), options
        self.context = multiprocessing.get_context("forkserver")
        # What takes seconds to import is imported once; no process touches the GPU before it is forked.
        self.context.set_forkserver_preload(["clplat.execution", "clplat.loop", "clplat.fitting"])
        self.running: dict[Job, tuple[BaseProcess, float]] = {}
        self.start = time.monotonic()
        self.ratios: dict[bool, list[float]] = {True: [], False: []}

    def run(self) -> None:
        try:
            while self.running or self._begin():
                self._begin()
                if self._late():
                    break
                time.sleep(0.2)
                self._reap()
        finally:
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.join()

    def _late(self) -> bool:
        late = self._left() <= 0
        if late:
            print(f"the time is over: {len(self.running)} runs are stopped and saved", flush=True)
        return late

    def _left(self) -> float:
        return 60 * self.options.minutes - (time.monotonic() - self.start)

    def _begin(self) -> bool:
        """Start what there is room and time for; whether anything runs."""
        while len(self.running) < self.options.jobs and (job := self._next()) is not None:
            self.waiting.remove(job)
            process = self.context.Process(target=work, args=(job.folder,))
            process.start()
            self.running[job] = (process, time.monotonic())
        return bool(self.running)

    def _next(self) -> Job | None:
        gpu_is_free = sum(job.on_gpu for job in self.running) < self.options.gpu_jobs
        fitting = (job for job in self.waiting if gpu_is_free or not job.on_gpu)
        return next((job for job in fitting if self._expected(job) <= self._left()), None)

    def _expected(self, job: Job) -> float:
        """The estimate, as far as the runs that have ended bore it out."""
        seen = self.ratios[job.on_gpu]
        return job.seconds * (sum(seen) / len(seen) if seen else 1.0)

    def _reap(self) -> None:
        for job, (process, begun) in list(self.running.items()):
            if process.is_alive():
                continue
            process.join()
            del self.running[job]
            took = time.monotonic() - begun
            if process.exitcode == 0:
                self.ratios[job.on_gpu].append(took / job.seconds)
            at = (time.monotonic() - self.start) / 60
            print(f"{at:5.1f} min  {job.folder.parent.name} {job.folder.name}: {took:.0f} s of {job.seconds:.0f}, "
                  f"exit code {process.exitcode}; {len(self.waiting)} wait", flush=True)  # fmt: skip


def conclude(out: Path) -> None:
    """The scores of every seed, the table, and all of it in one archive without checkpoints."""
    found = rows([out])
    with (out / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "source", "published", "seed", "final_score"])
        writer.writerows([row.name, row.entry.source, row.entry.published, seed, score]
                         for row in found for seed, score in row.finals.items())  # fmt: skip
    (out / "rows.md").write_text(table(found) + "\n")
    archive = Path(f"{out}.tgz")
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(out, out.name, filter=lambda entry: None if "/checkpoints" in entry.name else entry)
    print(f"{(out / 'rows.md').read_text()}\n{archive}: {archive.stat().st_size / 2**20:.2f} MiB")


def plan(names: Sequence[str], options: argparse.Namespace) -> None:
    total = {True: 0.0, False: 0.0}
    for name in names:
        study = wanted(name, options)
        (run, *_), minutes = expand(study), study.known_good[name].minutes * len(study.seeds)
        on_gpu = run.training.accelerator != "cpu"
        total[on_gpu] += minutes
        print(f"{name:34} {len(study.seeds)} seeds {minutes:6.1f} min  {'GPU' if on_gpu else 'CPU'}")
    print(
        f"{len(names)} rows: {total[False]:.0f} core-minutes on the CPU, {total[True]:.0f} process-minutes on the GPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or patterns of names; all of them by default")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--gpu-jobs", type=int, default=0, help="how many of them may be on the GPU at once")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of each row's own")
    parser.add_argument("--steps", type=int, help="steps a task instead of each row's own budget: to try this out")
    parser.add_argument("--out", type=Path, default=Path("published"))
    parser.add_argument("--plan", action="store_true", help="print what would be run, and stop")
    options = parser.parse_args()
    known = best.catalogue()
    for pattern in options.rows:
        if not fnmatch.filter(known, pattern):
            parser.error(f"--rows: nothing is called {pattern!r}; `clplat run --best` lists the names")
    names = order([name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in options.rows)])
    if options.plan:
        plan(names, options)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    # Whoever stops this command stops its runs, which then save themselves.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        Pool([job for name in names for job in laid_out(name, options)], options).run()
    except ClplatError as error:
        sys.exit(f"{parser.prog}: {error}")
    finally:
        if options.out.is_dir():
            conclude(options.out)


if __name__ == "__main__":
    main()
