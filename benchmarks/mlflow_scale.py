"""What MLflow costs: comparing a thousand runs, and recording runs while they train.

    python benchmarks/mlflow_scale.py compare [--runs 1000] [--points 10000]    # seconds of `clplat compare`
    python benchmarks/mlflow_scale.py overhead [--runs 50] [--steps 2000]       # time with the record / without

`compare` trains one small run and copies its rows in the database, with other scores and as many points as asked for,
until the study has its runs; what MLflow's client then reads is checked before anything is timed. `overhead` trains the
same run with its record and without in turn, in one process, and pairs the two: without means no MLflow and no files of
the record (tables, figures, environment); the journal, from which a run resumes, is written in both. What is imported
and made once a process is told apart. CPU time tells more than the clock where others use the machine; where even that
is noisy, what the record's own threads and calls take, counted where it is spent, tells most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import clplat
from clplat import record
from clplat.config import save
from clplat.execution import execute
from clplat.metrics import interval
from clplat.mlflow_store import client
from clplat.storage import read_json
from clplat.study_file import expand, load_study
from clplat.tracking import RUN_STATE, Feed

Spent = tuple[float, float, float]
"""Seconds of a run by the clock, of CPU time, and of CPU time in the record's own threads and calls."""
COUNTED = ((Feed, "_live"), (Feed, "close"), (record, "write_artifacts"))
VARIANTS = 20
KEYS = 40
"""Metrics with a history in every copied run."""
SCORED = ("final_score", "final_forgetting", "cumulative_forgetting", "learning_score")
INDEXES = ("index_metrics_run_uuid", "index_metrics_run_uuid_key_step")


def digits(uri: str, **changes: Any) -> dict[str, Any]:
    """A study of small runs on images that come with scikit-learn."""
    return {
        "name": "scale", "stream": {"class_path": "SplitDigits", "init_args": {"num_tasks": 5}},
        "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [256, 256]}},
        "training": {"batch_size": 64, "budget": {"steps": 20}, "accelerator": "cpu",
                     "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.02}}},
        "tracking": {"uri": uri},
    } | changes  # fmt: skip


def compare(options: argparse.Namespace) -> None:
    """Fill a database, check it, and time the command line on it."""
    folder = Path(options.folder or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    uri, seeds = f"sqlite:///{folder / 'mlflow.db'}", options.runs // VARIANTS
    if not (folder / "filled").is_file():
        start = time.perf_counter()
        done = clplat.run(digits(uri, folder=str(folder / "runs"), variants={"v0": {}}), quiet=True)
        fill(folder / "mlflow.db", read_json(done.folder / "v0-s0" / RUN_STATE), seeds, options.points)
        (folder / "filled").touch()
        print(f"filled in {time.perf_counter() - start:.0f} s", flush=True)
    check(uri, seeds * VARIANTS, options.points)
    size = (folder / "mlflow.db").stat().st_size / 2**30
    print(f"{seeds * VARIANTS} runs of {options.points} points, {size:.2f} GiB; clplat compare, seconds:", flush=True)
    command = [sys.executable, "-P", "-m", "clplat", "compare", "scale", "--uri", uri]
    spent = []
    for _ in range(options.repetitions):
        start = time.perf_counter()
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        spent.append(time.perf_counter() - start)
        if shown.count(f" {seeds} ") < VARIANTS:
            raise RuntimeError(f"not every variant is shown with {seeds} runs:\n{shown}")
    print(f"  {', '.join(f'{one:.2f}' for one in spent)}; median {statistics.median(spent):.2f} (goal: under 5)")


def fill(database: Path, state: dict[str, Any] | None, seeds: int, points: int) -> None:
    """Put copies of the one run that is there in its place: `VARIANTS` × `seeds`, each with `points` points."""
    assert state is not None
    draw, template = random.Random(0), state["run_id"]
    with sqlite3.connect(database) as store:
        store.execute("PRAGMA synchronous = OFF")
        (parent,) = store.execute(
            "SELECT value FROM tags WHERE key = 'mlflow.parentRunId' AND run_uuid = ?", (template,)
        ).fetchone()
        planned = {"variants": [f"v{n}" for n in range(VARIANTS)], "seeds": list(range(seeds))}
        for name, value in planned.items():
            store.execute("UPDATE tags SET value = ? WHERE key = ? AND run_uuid = ?", (json.dumps(value), name, parent))
        copies = []
        for variant in planned["variants"]:
            for seed in planned["seeds"]:
                copies.append(uuid.UUID(int=draw.getrandbits(128)).hex)
                copy_run(store, template, copies[-1], variant, seed, draw)
        store.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (template,))
        add_points(store, copies, points)


def copy_run(store: sqlite3.Connection, template: str, run: str, variant: str, seed: int, draw: random.Random) -> None:
    """One more run with the template's artifacts, tags and parameters, and scores of its own."""
    name = f"{variant}-s{seed}"
    (place,) = store.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", (template,)).fetchone()
    source = Path(place.removeprefix("file://"))
    target = source.parent.parent / run / "artifacts"
    shutil.copytree(source, target)
    store.execute(
        "INSERT INTO runs SELECT ?, ?, source_type, source_name, entry_point_name, user_id, status, start_time, "
        "end_time, source_version, lifecycle_stage, ?, experiment_id, deleted_time FROM runs WHERE run_uuid = ?",
        (run, name, target.as_uri(), template),
    )
    for table, columns in (("tags", "key, value"), ("params", "key, value"),
                           ("latest_metrics", "key, value, timestamp, step, is_nan")):  # fmt: skip
        store.execute(
            f"INSERT INTO {table} ({columns}, run_uuid) SELECT {columns}, ? FROM {table} WHERE run_uuid = ?",
            (run, template),
        )
    own = {"variant": variant, "seed": str(seed), "mlflow.runName": name}
    store.executemany(
        "UPDATE tags SET value = ? WHERE key = ? AND run_uuid = ?", [(value, key, run) for key, value in own.items()]
    )
    shift = draw.gauss(0.0, 0.05)
    marks = ", ".join("?" * len(SCORED))
    store.execute(
        f"UPDATE latest_metrics SET value = value + ? WHERE run_uuid = ? AND key IN ({marks})", (shift, run, *SCORED)
    )


def add_points(store: sqlite3.Connection, runs: list[str], points: int) -> None:
    """Histories of `KEYS` metrics for all runs, in the order of the primary key, which is what makes it fast."""
    indexes = [row[0] for row in store.execute(
        "SELECT sql FROM sqlite_master WHERE type = 'index' AND name IN (?, ?)", INDEXES)]  # fmt: skip
    for name in INDEXES:
        store.execute(f"DROP INDEX IF EXISTS {name}")
    store.execute("CREATE TEMP TABLE filled (run TEXT PRIMARY KEY)")
    store.executemany("INSERT INTO filled VALUES (?)", [(run,) for run in sorted(runs)])
    for key in sorted(f"train/part_{number}" for number in range(KEYS)):
        store.execute(
            "WITH RECURSIVE at(step) AS (SELECT 1 UNION ALL SELECT step + 1 FROM at WHERE step < ?) "
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "SELECT ?, 1.0 / step, 1700000000000 + step, run, step, 0 FROM at CROSS JOIN filled",
            (points // KEYS, key),
        )
        store.execute(
            "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) "
            "SELECT ?, 1.0 / ?, 1700000000000 + ?, ?, 0, run FROM filled",
            (key, *[points // KEYS] * 3),
        )
    for statement in indexes:
        store.execute(statement)


def check(uri: str, runs: int, points: int) -> None:
    """That MLflow's own client finds what was written behind its back."""
    connection = client(uri)
    experiment = connection.get_experiment_by_name("clplat").experiment_id
    found = connection.search_runs([experiment], "tags.seed = '0'", max_results=1000)
    if len(found) != VARIANTS:
        raise RuntimeError(f"MLflow finds {len(found)} runs of seed 0, not {VARIANTS}")
    run = found[0].info.run_id
    there = sum(len(connection.get_metric_history(run, f"train/part_{number}")) for number in range(KEYS))
    if there != points // KEYS * KEYS:
        raise RuntimeError(f"MLflow finds {there} points of a run, not {points}")
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as store:
        (whole,) = store.execute("SELECT COUNT(*) FROM metrics WHERE key LIKE 'train/part_%'").fetchone()
    if whole != runs * there:
        raise RuntimeError(f"{whole} points in the database, not {runs * there}")


def overhead(options: argparse.Namespace) -> None:
    """Train with the record and without it in turn; what it takes in seconds of CPU time, and its share of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        uri, begun = f"sqlite:///{scratch}/mlflow.db", time.process_time()
        client(uri).search_experiments()
        once = time.process_time() - begun
        pairs: list[tuple[Spent, Spent]] = []
        for number in range(options.runs + 1):
            order = (True, False) if number % 2 else (False, True)
            spent = {tracked: _one(Path(scratch), uri, number, tracked, options.steps) for tracked in order}
            if number:  # the first pair imports and warms up
                pairs.append((spent[True], spent[False]))
    extra, without = (interval(values) for values in zip(*((on[1] - off[1], off[1]) for on, off in pairs), strict=True))
    print(f"{options.runs} pairs of runs of 5 × {options.steps} steps, mean ± 95 % interval, seconds of CPU time:")
    print(f"  once a process, importing MLflow and making its database {once:.1f}; a run {without}, its record {extra}")
    for what, place in (("by CPU time", 1), ("by clock", 0)):
        ratios = [on[place] / off[place] for on, off in pairs]
        print(f"  {what} {interval(ratios)} times (median {statistics.median(ratios):.3f})")
    counted, shares = [on[2] for on, _ in pairs], [on[2] / (on[1] - on[2]) for on, _ in pairs]
    print(f"  counted in its own threads and calls {interval(counted)} s: {interval(shares)} of the rest (goal: 0.02)")


class Counter:
    """Seconds of CPU time inside some functions, each in the thread that calls it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def counting(self, owner: Any, name: str) -> Any:
        """A patch of `owner.name` that counts."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begun

        return mock.patch.object(owner, name, call)


def _one(scratch: Path, uri: str, number: int, tracked: bool, steps: int) -> Spent:
    """One whole run, its last upload included."""
    study = digits(uri, seeds=[number])
    study["tracking"] = {"uri": uri, "enabled": tracked}
    study["training"] = study["training"] | {"budget": {"steps": steps}}
    folder, counter = scratch / f"run-{number}-{tracked}", Counter()
    folder.mkdir()
    save(expand(load_study(study))[0], folder / "config.yaml")
    with contextlib.ExitStack() as patches:
        if not tracked:
            patches.enter_context(mock.patch.object(record, "write_artifacts", lambda folder: None))
        for owner, name in COUNTED:
            patches.enter_context(counter.counting(owner, name))
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = execute(folder)
        spent = time.perf_counter() - wall, time.process_time() - cpu, counter.seconds
    if outcome.status != "FINISHED":
        raise RuntimeError(outcome.reason)
    shutil.rmtree(folder)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "overhead"])
    parser.add_argument("--runs", type=int, help="runs of the study (1000), or pairs of runs (50)")
    parser.add_argument("--points", type=int, default=10_000, help="metric points of a run")
    parser.add_argument("--steps", type=int, default=2_000, help="optimizer steps of a task")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="where the database goes, kept and used again (default: a temporary folder)")
    options = parser.parse_args()
    options.runs = options.runs or (1_000 if options.what == "compare" else 50)
    if options.runs % VARIANTS and options.what == "compare":
        parser.error(f"--runs must be a multiple of {VARIANTS}")
    torch.set_num_threads(1)
    {"compare": compare, "overhead": overhead}[options.what](options)


if __name__ == "__main__":
    main()
