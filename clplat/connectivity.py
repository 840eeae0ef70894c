"""Mode connectivity: the loss on straight lines between the weights that a run had after its tasks.

    clplat analyze connectivity runs/…/er-s0      # needs checkpoint.snapshots: boundary

    θ(α) = (1 − α) θ_i + α θ_j        barrier = max_α [L(θ(α)) − ((1 − α) L(θ_i) + α L(θ_j))]

Two minima count as connected where the barrier is at most 5 % of the mean loss of the ends. A convex loss has none.
After Ren et al. 2024 (arXiv:2402.18865), whose grids and measures are not known to us: these are our own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.architectures.base import Adapters, Architecture
from clplat.assembly import Parts, assemble, load_weights
from clplat.checkpoint import file_hash
from clplat.config import RunConfig, load_run
from clplat.errors import ConfigError, StorageError
from clplat.loaders import resident
from clplat.precision import autocast
from clplat.strategies.world import World
from clplat.streams.base import Data, spread_rows
from clplat.streams.batch import IGNORE

SHARE = 0.05
"""Largest barrier of connected minima, as a share of the mean loss of the ends."""
State = dict[str, Tensor]
Space = Literal["weights", "products"]
"""`weights` moves every tensor, factors of adapters one by one; `products` moves the sum of the adapters' B·A."""
Losses = dict[str, float]
LINES = """α = 0 are the weights after the first task of a line, 1 those after the second. Losses of test rows: earlier,
of the tasks trained by the first; later, of the second alone; seen, of all up to the second; general, of the probes."""
"""What pictures and tables call the ends of a line and the sets of rows."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The losses on the line from one task's weights to another's, by the set that they were measured on."""

    first: str
    second: str
    space: Space
    weights: str
    """Which weights move, in words: those that answer after a task, such as `fast (adapter default, not slow)`."""
    distance: float
    """Euclidean distance of the ends in this space; `products` without the factor alpha / rank."""
    alphas: list[float]
    losses: dict[str, list[float]]

    def barrier(self, name: str) -> float:
        """Height of the loss above the straight line between its ends; at least 0."""
        values = self.losses[name]
        chord = [(1 - a) * values[0] + a * values[-1] for a in self.alphas]
        return max(value - line for value, line in zip(values, chord, strict=True))

    def connected(self, name: str) -> bool:
        """Whether the barrier stays below the share of the ends' mean loss that still counts as flat."""
        values = self.losses[name]
        return self.barrier(name) <= SHARE * (values[0] + values[-1]) / 2


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run was after a task."""

    index: int
    task: str
    structure: dict[str, Any]
    weights: State


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
    measure, model = _Measure(parts, config, rows), parts.architecture.eval()
    own = " ".join(strategy.own_weights for strategy in parts.hooks.strategies.values() if strategy.own_weights)
    pairs = [(a, b) for place, b in enumerate(held) for a in held[max(0, place - gap) : place]]
    alphas = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    walks, factors = [], {}
    for second in held:
        load_weights(model, {"structure": second.structure, "architecture": second.weights}, config.training.precision)
        factors[second.index] = _factors(model)
        walks += [_weight_walk(model, first, second, own, alphas, measure) for first, end in pairs
                  if end is second and alike(first, second)]  # fmt: skip
    if isinstance(model, Adapters) and all(map(_low_rank, factors.values())):
        walks += list(_product_walks(model, pairs, factors, own, alphas, measure))
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


def alike(first: Snapshot, second: Snapshot) -> bool:
    """Whether there is a line between them: the same tensors in the same shapes, used in the same way."""
    shapes = [{name: value.shape for name, value in snapshot.weights.items()} for snapshot in (first, second)]
    return shapes[0] == shapes[1] and first.structure == second.structure


def resting(first: Snapshot, second: Snapshot) -> list[str]:
    """Adapters that answer at neither end."""
    known = [*second.structure.get("adapters", ()), *second.structure.get("memories", ())]
    return [name for name in known if all(name not in end.structure["active"] for end in (first, second))]


def moved(first: Snapshot, second: Snapshot, own: str) -> str:
    """Which weights the line between them moves, `own` what a strategy with further ones calls them."""
    ends = [", ".join(end.structure.get("active", ())) for end in (first, second)]
    if not any(ends):
        return own or "all"
    adapters = f"adapter {' → '.join(dict.fromkeys(ends))}"
    others = f", not {', '.join(found)}" if (found := resting(first, second)) else ""
    return f"{own} ({adapters}{others})" if own else adapters + others


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> State:
    """(1 − α) first + α second; the ends themselves at 0 and 1. What is no floating number is the second's."""
    return {
        name: torch.lerp(first[name], value, alpha) if value.is_floating_point() and 0 < alpha < 1
        else (first[name] if alpha == 0 else value)
        for name, value in second.items()
    }  # fmt: skip


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Euclidean distance over all floating tensors."""
    parts = [(value.double() - first[name].double()).square().sum() for name, value in second.items()
             if value.is_floating_point()]  # fmt: skip
    return float(torch.stack(parts).sum().sqrt())


def walk(
    ends: tuple[str, str],
    space: Space,
    weights: str,
    apart: float,
    alphas: Sequence[float],
    losses: Callable[[float], Losses],
) -> Walk:
    """The losses at every alpha, set by set."""
    found = [losses(alpha) for alpha in alphas]
    by_set = {name: [each[name] for each in found] for name in found[0]}
    return Walk(
        first=ends[0], second=ends[1], space=space, weights=weights, distance=apart, alphas=list(alphas), losses=by_set
    )


def _weight_walk(
    model: Architecture, first: Snapshot, second: Snapshot, own: str, alphas: Sequence[float], measure: _Measure
) -> Walk:
    def losses(alpha: float) -> Losses:
        model.load_state_dict(between(first.weights, second.weights, alpha))
        return measure(first.index, second.index)

    idle = [f".{name}." for name in resting(first, second)]
    answering = {name: value for name, value in second.weights.items() if not any(part in name for part in idle)}
    ends, words = (first.task, second.task), moved(first, second, own)
    return walk(ends, "weights", words, distance(first.weights, answering), alphas, losses)


Factors = list[State]
"""The tensors of every active adapter, by name."""


def _factors(model: Architecture) -> Factors:
    if not isinstance(model, Adapters):
        return []
    named = [model.adapter_parameters(adapter) for adapter in model.active] if model.adapter_names() else []
    return [{name: value.detach().clone() for name, value in tensors.items()} for tensors in named]


def _low_rank(factors: Factors) -> bool:
    """Whether there are adapters, all of them products B A."""
    return bool(factors) and all(name.endswith((".lora_A", ".lora_B")) for tensors in factors for name in tensors)


def _product_walks(
    model: Any, pairs: Sequence[tuple[Snapshot, Snapshot]], factors: Mapping[int, Factors], own: str,
    alphas: Sequence[float], measure: _Measure,
) -> Iterator[Walk]:  # fmt: skip
    """Lines between the changes themselves, (1 − α) Σ B_i A_i + α Σ B_j A_j: both ends' adapters answer together, each
    with its B scaled."""
    added = [f"line_{number}" for number in range(2 * max(map(len, factors.values())))]
    for adapter in added:
        model.add_adapter(adapter)
    model.eval()  # new adapters come with a dropout of their own
    for first, second in pairs:
        ends = (factors[first.index], factors[second.index])

        def losses(alpha: float, first: Snapshot = first, second: Snapshot = second, ends: Any = ends) -> Losses:
            _set_adapters(model, added, ends, alpha)
            return measure(first.index, second.index)

        apart = _product_distance(*ends)
        yield walk((first.task, second.task), "products", moved(first, second, own), apart, alphas, losses)


@torch.no_grad()
def _set_adapters(model: Any, added: Sequence[str], ends: tuple[Factors, Factors], alpha: float) -> None:
    scaled = [(1 - alpha, tensors) for tensors in ends[0]] + [(alpha, tensors) for tensors in ends[1]]
    used = added[: len(scaled)]
    for adapter, (share, tensors) in zip(used, scaled, strict=True):
        for name, parameter in model.adapter_parameters(adapter).items():
            parameter.copy_(tensors[name] * share if name.endswith("lora_B") else tensors[name])
    model.use_adapters(used, [])


def _product_distance(first: Factors, second: Factors) -> float:
    layers = [name.removesuffix(".lora_A") for name in second[0] if name.endswith(".lora_A")]
    found = [(_change(second, layer) - _change(first, layer)).square().sum() for layer in layers]
    return float(torch.stack(found).sum().sqrt())


def _change(adapters: Factors, layer: str) -> Tensor:
    return torch.stack([a[f"{layer}.lora_B"].double() @ a[f"{layer}.lora_A"].double() for a in adapters]).sum(0)


class _Measure:
    """Mean losses of the model as it is, on the sets that a pair of tasks is judged by."""

    def __init__(self, parts: Parts, config: RunConfig, rows: int) -> None:
        self.model, self.objective, self.device = parts.architecture, parts.evaluator.objective, parts.device
        self.precision, self.at_once, self.rows = config.training.precision, config.evaluation.batch_size, rows
        self.tasks = {task.index: resident(task.test.data, parts.device) for task in parts.stream.tasks}
        language = parts.stream.spec.kind == "language"
        self.probes = [resident(probe.data, parts.device) for probe in parts.stream.probes if language]

    def __call__(self, first: int, second: int) -> Losses:
        found = {index: self.loss(data) for index, data in self.tasks.items() if index <= second}
        earlier = [value for index, value in found.items() if index <= first]
        sets = {"earlier": earlier, "later": [found[second]], "seen": list(found.values())}
        if self.probes:
            sets["general"] = [self.loss(probe) for probe in self.probes]
        return {name: sum(values) / len(values) for name, values in sets.items()}

    @torch.no_grad()
    def loss(self, data: Data) -> float:
        """Nats for each prediction, over rows that are spread evenly."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for rows in spread_rows(len(data), self.rows).split(self.at_once):
            batch = data.batch(rows).to(self.device)
            with autocast(self.precision, self.device):
                output = self.model(batch)
            output.logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
            nats = self.objective.row_loss(output, batch).double().sum()
            total += torch.stack([nats, (batch.targets != IGNORE).sum().double()])
        return float(total[0] / total[1])


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
