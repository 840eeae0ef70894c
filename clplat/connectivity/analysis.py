"""A run's snapshots, the lines between them, and what was found there as tables and a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clplat.architectures.base import Adapters, Architecture
from clplat.assembly import assemble, load_weights
from clplat.checkpoint import file_hash
from clplat.config import RunConfig, load_run
from clplat.connectivity.lines import Losses, Snapshot, Walk, alike, between, distance, moved, resting, walk
from clplat.connectivity.measure import Measure
from clplat.connectivity.products import factors_of, low_rank, product_walks
from clplat.errors import ConfigError, StorageError
from clplat.strategies.world import World


def analyze(run: Path, *, points: int = 11, gap: int = 2, rows: int = 200) -> list[Walk]:
    """Walk between the snapshots of a run that are at most `gap` tasks apart, `points` losses a line, ends included.

    Each loss is a mean over `rows` test rows of a task, spread evenly: of the tasks trained by the first end
    (`earlier`), of the second end's own (`later`), of all up to it (`seen`), and of a language stream's probes
    (`general`). ConfigError where the run kept no weights.
    """
    if points < 3 or gap < 1 or rows < 1:
        raise ConfigError(f"points, gap, rows: at least 3, 1 and 1, got {points}, {gap} and {rows}")
    config = load_run(run / "config.yaml")
    files = snapshot_files(run, config)
    parts = assemble(config, World())
    tasks = {task.index: task.name for task in parts.stream.tasks}
    held = [_read(path, tasks) for path in files]
    measure, model = Measure(parts, config, rows), parts.architecture.eval()
    own = " ".join(strategy.own_weights for strategy in parts.hooks.strategies.values() if strategy.own_weights)
    pairs = [(a, b) for place, b in enumerate(held) for a in held[max(0, place - gap) : place]]
    alphas = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    walks, factors = [], {}
    for second in held:
        load_weights(model, {"structure": second.structure, "architecture": second.weights}, config.training.precision)
        factors[second.index] = factors_of(model)
        walks += [_weight_walk(model, first, second, own, alphas, measure) for first, end in pairs
                  if end is second and alike(first, second)]  # fmt: skip
    if isinstance(model, Adapters) and all(map(low_rank, factors.values())):
        walks += list(product_walks(model, pairs, factors, own, alphas, measure))
    if not walks:
        raise ConfigError(f"{run}: no two of its snapshots hold the same tensors, so that there is no line between "
                          "them; side memories are new in every task but with Locas' after_task: keep_one")  # fmt: skip
    return walks


def snapshot_files(run: Path, config: RunConfig) -> list[Path]:
    """The weights that a run kept, in the order of its tasks; two or more, or an error that names the option."""
    files = sorted((run / "snapshots").glob("*.pt"))
    if config.checkpoint.snapshots == "none":
        raise ConfigError(f"{run}: kept no weights of its tasks; run it with checkpoint.snapshots: boundary")
    if len(files) < 2:
        raise ConfigError(f"{run}: {len(files)} of its tasks left weights, and a line has two ends; a run that trains "
                          "its tasks one by one, to its end, leaves as many as there are tasks")  # fmt: skip
    return files


def _read(path: Path, tasks: Mapping[int, str]) -> Snapshot:
    if file_hash(path) != path.stem.rpartition("-")[2]:
        raise StorageError(f"{path}: damaged or cut short; bring a good copy back, or run the study again")
    state, index = torch.load(path, map_location="cpu", weights_only=True), int(path.name.partition("-")[0]) - 1
    return Snapshot(index=index, task=tasks[index], structure=state["structure"], weights=state["architecture"])


def _weight_walk(
    model: Architecture, first: Snapshot, second: Snapshot, own: str, alphas: Sequence[float], measure: Measure
) -> Walk:
    def losses(alpha: float) -> Losses:
        model.load_state_dict(between(first.weights, second.weights, alpha))
        return measure(first.index, second.index)

    idle = [f".{name}." for name in resting(first, second)]
    answering = {name: value for name, value in second.weights.items() if not any(part in name for part in idle)}
    ends, words = (first.task, second.task), moved(first, second, own)
    return walk(ends, "weights", words, distance(first.weights, answering), alphas, losses)


def write(walks: Sequence[Walk], folder: Path) -> tuple[Path, Path]:
    """`connectivity.csv` (every loss), `barriers.csv` (one line a walk and set) and `connectivity.png`; the paths of
    the first two."""
    from clplat.figures import connectivity_panels

    folder.mkdir(exist_ok=True)
    lines, barriers = folder / "connectivity.csv", folder / "barriers.csv"
    ends = [(w, name) for w in walks for name in w.losses]
    with lines.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["first", "second", "space", "set", "alpha", "loss"])
        rows.writerows([w.first, w.second, w.space, name, alpha, loss] for w, name in ends
                       for alpha, loss in zip(w.alphas, w.losses[name], strict=True))  # fmt: skip
    with barriers.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["first", "second", "space", "weights", "distance", "set", "barrier", "connected"])
        rows.writerows([w.first, w.second, w.space, w.weights, w.distance, name, w.barrier(name), w.connected(name)]
                       for w, name in ends)  # fmt: skip
    panels = {f"{w.first} → {w.second} ({w.space})": (w.alphas, w.losses) for w in walks}
    connectivity_panels(panels).savefig(folder / "connectivity.png", dpi=120)
    return lines, barriers
