"""What the platform itself costs when a stream is long or large.

    python benchmarks/scale.py tasks [--tasks 500]       # seconds of platform time a task, first tasks to last
    python benchmarks/scale.py text [--gigabytes 5]      # a text domain on disk: cached, killed, resumed, trained on

Platform time is what a task takes beside training steps and scoring: a new Trainer, the record, summaries,
checkpoints. A task of a stream of T tasks is scored T times, at most on `evaluation.max_rows` rows each, so scoring
alone grows with the number of tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clplat.config import RunConfig, save
from clplat.interruption import Interruption
from clplat.journal import Journal
from clplat.loop import Run
from clplat.streams.base import EvalSet, Spec, Stream, Task, TensorData
from clplat.streams.scorers import Classify
from clplat.study_file import expand, load_study


class TinyTasks(Stream):
    """Many tasks of 64 training rows and 16 test rows."""

    def __init__(self, *, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def prepare(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.spec = Spec(kind="classify", input_shape=(16,), num_outputs=2, scenario="domain")
        self.tasks = []
        for index in range(self.num_tasks):
            rows = [TensorData(torch.randn(n, 16, generator=draw), torch.arange(n) % 2, task=index) for n in (64, 16)]
            test = EvalSet(name=f"task-{index}", data=rows[1], scorer=Classify())
            self.tasks.append(
                Task(index=index, name=test.name, train=rows[0], test=test, classes=(0, 1), headline="accuracy")
            )


class Watch:
    """Notes the time, and what the run has counted as training and scoring, at every boundary."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.notes: list[tuple[float, float, float]] = []

    def step(self, task: str, done: int, total: int, loss: float | None) -> None:
        pass

    def boundary(self, row: int, summary: Mapping[str, float]) -> None:
        assert self.run is not None
        costs = self.run.costs
        self.notes.append((time.perf_counter(), costs.training_seconds, costs.evaluation_seconds))


def tasks(options: argparse.Namespace) -> None:
    """Seconds of platform time a task, and of scoring, over the stream."""
    study = {
        "name": "scale", "stream": {"class_path": "scale.TinyTasks", "init_args": {"num_tasks": options.tasks}},
        "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [16]}},
        "training": {"batch_size": 16, "budget": {"steps": 4}, "accelerator": "cpu"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch()
        run = _run(expand(load_study(study))[0], Path(scratch), watch)
        watch.run = run
        run.execute()
    spent = [tuple(b - a for a, b in zip(before, now, strict=True))
             for before, now in zip(watch.notes, watch.notes[1:], strict=False)]  # fmt: skip
    platform = [whole - training - scoring for whole, training, scoring in spent]  # steps are timed by themselves
    size = max(1, len(platform) // 5)
    print(f"{options.tasks} tasks of 4 steps; seconds a task, median of each fifth of the stream")
    print("tasks              platform    scoring")
    for start in range(0, len(platform) - size + 1, size):
        part = slice(start, start + size)
        scoring = statistics.median(scored for _, _, scored in spent[part])
        print(f"{start + 1:4} to {start + size:4}     {statistics.median(platform[part]):10.4f} {scoring:10.4f}")
    slowest = max(range(len(platform)), key=platform.__getitem__)
    print(f"slowest: task {slowest + 1}, {platform[slowest]:.3f} s of platform time (goal: under 0.25)")


def _run(config: RunConfig, folder: Path, watch: Any) -> Run:
    save(config, folder / "config.yaml")
    return Run(config, folder, journal=Journal(folder), interruption=Interruption(), progress=watch)


def text(options: argparse.Namespace) -> None:
    """A domain of many gigabytes: cached in a process that is killed half way, resumed, opened, trained on."""
    folder = Path(options.folder or tempfile.mkdtemp())
    source = folder / "text.jsonl"
    if not source.is_file():
        write_text(source, int(options.gigabytes * 2**30))
    print(f"{source}: {source.stat().st_size / 2**30:.2f} GiB")
    environment = os.environ | {"CLPLAT_CACHE": str(folder / "cache"), "SCALE_TEXT": str(source)}
    command = [sys.executable, "-P", __file__, "one-run", "--folder", str(folder)]
    start = time.perf_counter()
    killed = subprocess.Popen(command, env=environment)
    while not any((folder / "cache" / "tokens").glob("*/progress.json")) or time.perf_counter() - start < options.kill:
        time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (progress,) = (folder / "cache" / "tokens").glob("*/progress.json")
    parts = json.loads(progress.read_text())["parts"]
    written = sum(part["tokens"] for part in parts.values())
    print(f"killed after {time.perf_counter() - start:.0f} s with {written / 1e9:.2f}G tokens committed", flush=True)
    subprocess.run(command, env=environment, check=True)
    print("and once more, from the finished cache:", flush=True)
    subprocess.run(command, env=environment, check=True)


def write_text(path: Path, size: int) -> None:
    """Random words as JSON lines of 4 KiB, until the file is large enough."""
    import numpy as np

    draw = np.random.default_rng(0)
    words = np.array(["".join(map(chr, draw.integers(97, 123, length))) for length in draw.integers(2, 9, 20_000)])
    with path.open("w") as file:
        while file.tell() < size:
            for row in words[draw.zipf(1.3, (2_000, 700)) % len(words)]:
                file.write(json.dumps({"text": " ".join(row)}) + "\n")


def one_run(options: argparse.Namespace) -> None:
    """Prepare the stream and train a few steps, with the private memory that this took."""
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(peak, done), daemon=True)
    watcher.start()
    study = {
        "name": "large", "architecture": {"class_path": "Transformer", "init_args": {"hidden_size": 64}},
        "stream": {
            "class_path": "TextStream",
            "init_args": {
                "domains": [
                    {"name": "large", "path": "json", "data_files": {"train": "${SCALE_TEXT}"},
                     "holdout": {"fraction": 0.001}}
                ],
                "max_eval_tokens": 8_192,
            },
        },
        "training": {"batch_size": 8, "budget": {"steps": 20}, "accelerator": "cpu"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    start = time.perf_counter()
    config = expand(load_study(study))[0]
    with tempfile.TemporaryDirectory() as scratch:
        run = _run(config, Path(scratch), Watch())
        ready = time.perf_counter() - start
        tokens = len(run.path[0].train) * run.path[0].train.tokens_per_row
        run.progress.run = run  # type: ignore[attr-defined]
        run.execute()
    done.set()
    watcher.join()
    trained = time.perf_counter() - start - ready
    print(f"  ready after {ready:.0f} s with {tokens / 1e9:.2f}G training tokens; 20 steps and two evaluations "
          f"{trained:.0f} s; peak private memory {peak[0] / 2**30:.2f} GiB", flush=True)  # fmt: skip


def _watch_memory(peak: list[int], done: threading.Event) -> None:
    """The largest anonymous memory of this process: what no file stands behind and nobody shares."""
    while not done.wait(0.2):
        lines = Path("/proc/self/status").read_text().splitlines()
        now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "text", "one-run"])
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--kill", type=float, default=60.0, help="seconds after which the first attempt is killed")
    parser.add_argument("--folder", help="where the text and its cache go (default: a temporary folder)")
    options = parser.parse_args()
    if options.tasks < 1 or options.gigabytes <= 0 or options.kill <= 0:
        parser.error("--tasks must be at least 1, --gigabytes and --kill more than 0")
    torch.set_num_threads(1)
    {"tasks": tasks, "text": text, "one-run": one_run}[options.what](options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
