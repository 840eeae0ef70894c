"""The trials of a search as a table, those among them that nothing beats, and the one that is best."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from clplat.dominance import pareto
from clplat.tuning.space import Space
from clplat.tuning.words import exact, named, number, setting

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "FINISHED", "PRUNED": "PRUNED", "FAIL": "FAILED", "RUNNING": "RUNNING"}
"""Optuna's words for what a trial came to, and those of the run folders."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial: `objectives` and `settings` by name; `objectives` is empty where it did not finish."""

    number: int
    state: str
    objectives: dict[str, float]
    settings: dict[str, Any]
    is_default: bool
    on_front: bool
    reason: str

    @property
    def name(self) -> str:
        """Of its variant in the study of trials."""
        return f"t{self.number:04d}"


def table(trials: Sequence[FrozenTrial], space: Space, objectives: Mapping[str, int]) -> list[Row]:
    """Every trial that was begun, by number; `objectives` with their directions."""
    finished = [t for t in trials if t.state.name == "COMPLETE"]
    kept = pareto([t.values for t in finished], list(objectives.values()))
    front = {t.number for t, on_front in zip(finished, kept, strict=True) if on_front}
    return [
        Row(
            number=t.number, state=STATES[t.state.name],
            objectives=dict(zip(objectives, t.values, strict=True)) if t.state.name == "COMPLETE" else {},
            settings=space.values(t.params) if t.params.keys() == space.dimensions.keys() else {},
            is_default=bool(t.user_attrs.get("default")), on_front=t.number in front,
            reason=t.user_attrs.get("reason", ""),
        )
        for t in trials if not _never_begun(t)
    ]  # fmt: skip


def _never_begun(trial: FrozenTrial) -> bool:
    """A number that Optuna gave out and whose tune was killed before it had settings; another trial stands for it."""
    return trial.state.name == "FAIL" and not trial.params and "reason" not in trial.user_attrs


def best(rows: Sequence[Row], objectives: Mapping[str, int]) -> Row | None:
    """The trial of the front that is best in the first objective, then in the next; the earlier one of equals."""
    front = [row for row in rows if row.on_front]
    if not front:
        return None
    return max(front, key=lambda row: ([d * row.objectives[name] for name, d in objectives.items()], -row.number))


def counts(rows: Sequence[Row]) -> str:
    """How many trials there are, and what they came to."""
    states = [row.state for row in rows]
    words = {"FINISHED": "finished", "PRUNED": "pruned", "FAILED": "failed", "RUNNING": "not ended"}
    parts = [f"{states.count(state)} {word}" for state, word in words.items() if state in states]
    return f"{len(rows)} trial{'s' * (len(rows) != 1)}: {', '.join(parts)}."


def write_csv(rows: Sequence[Row], objectives: Sequence[str], keys: Sequence[str], path: Path) -> None:
    """One line a trial: what it came to, whether it is on the front, its objectives, its settings."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "status", "front", "default", *objectives, *keys, "reason"])
        for row in rows:
            scores = [repr(row.objectives[name]) if row.objectives else "" for name in objectives]
            settings = [exact(row.settings.get(key, "")) for key in keys]
            truths = [str(row.on_front).lower(), str(row.is_default).lower()]
            writer.writerow([row.name, row.state, *truths, *scores, *settings, row.reason])


def front_table(rows: Sequence[Row]) -> Table:
    """The front for a terminal: objectives and settings of each trial on it, and of the default."""
    shown = [row for row in rows if row.on_front or (row.is_default and row.objectives)]
    names = list(shown[0].objectives)
    keys = list(shown[0].settings)
    table = Table("trial", "front", title="Pareto front, and the default settings")
    for head in (*map(named, names), *(key.split(".")[-1] for key in keys)):
        table.add_column(head, justify="right", overflow="fold")
    for row in shown:
        name, kept = "default" if row.is_default else row.name, "yes" if row.on_front else "no"
        reached = [number(metric, row.objectives[metric]) for metric in names]
        table.add_row(name, kept, *reached, *map(setting, row.settings.values()))
    return table
