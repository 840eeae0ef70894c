"""The result table: every score of a run, and what of it summaries read.

S is the signed headline score: rows 0..T (row 0 before training), columns tasks 1..T, higher is better, NaN
where a task cannot be answered. A loss of 2.1 nats is a score of −2.1.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Curve = Sequence[tuple[int, Scores]]
"""The scores S of all tasks at optimizer steps on a grid, boundaries included, in order."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measured score. `index` is the task's place in the stream, None for a probe."""

    view: str
    metric: str
    task: str
    index: int | None
    value: float
    total: float
    count: float
    higher_is_better: bool
    headline: bool


_KIND = ("view", "metric", "task", "index", "higher_is_better", "headline")
"""What of a cell is the same in every row."""


class ResultTable:
    """R[view, metric, i, j]: the score of task j after training through task i; row 0 is before training."""

    def __init__(self) -> None:
        # Rows as numbers, and what summaries read kept up row by row: with hundreds of tasks there are hundreds of
        # thousands of cells, and as objects they would slow down every walk of Python's garbage collector.
        self._rows: dict[int, tuple[int, NDArray[np.int64], Scores]] = {}
        self._kinds: dict[tuple[Any, ...], int] = {}
        self._headlines: dict[int, Scores] = {}
        self._names: dict[int, str] = {}

    def add(self, row: int, step: int, cells: Sequence[Cell]) -> None:
        """Fill row `row`, measured at optimizer step `step`."""
        kinds = [tuple(getattr(cell, name) for name in _KIND) for cell in cells]
        places = np.array([self._kinds.setdefault(kind, len(self._kinds)) for kind in kinds], dtype=np.int64)
        numbers = np.array([[cell.value, cell.total, cell.count] for cell in cells], dtype=np.float64)
        self._rows[row] = (step, places, numbers.reshape(-1, 3))
        self._note(row, cells)

    def _note(self, row: int, cells: Sequence[Cell]) -> None:
        """Keep up what summaries read."""
        self._headlines[row] = headline_scores(cells)
        self._names |= {c.index: c.task for c in cells if c.index is not None}

    def rows(self) -> list[int]:
        """The rows that are there, in order."""
        return sorted(self._rows)

    def steps(self) -> list[int]:
        """The optimizer step of each row."""
        return [self._rows[row][0] for row in self.rows()]

    def cells(self, row: int) -> list[Cell]:
        """All scores of one row."""
        kinds, (_, places, numbers) = list(self._kinds), self._rows[row]
        return [
            Cell(**dict(zip(_KIND, kinds[place], strict=True)), value=value, total=total, count=count)
            for place, (value, total, count) in zip(places.tolist(), numbers.tolist(), strict=True)
        ]

    def tasks(self) -> list[str]:
        """Task names in stream order, probes left out."""
        return [self._names[index] for index in sorted(self._names)]

    def matrix(self, metric: str, view: str = "default") -> Scores:
        """Raw values (T+1, T) of one metric through one view; NaN where not measured."""
        return self.values(lambda cell: cell.metric == metric and cell.view == view)

    def values(self, wanted: Callable[[Cell], bool]) -> Scores:
        """Raw values (T+1, T) of those scores of tasks, of which there is one at most of each in a row; NaN else."""
        table = np.full((len(self._names) + 1, len(self._names)), np.nan)
        for row in self.rows():
            for cell in self.cells(row):
                if cell.index is not None and wanted(cell):
                    table[row, cell.index] = cell.value
        return table

    def views(self) -> list[str]:
        """The views beside the default one through which tasks were scored."""
        seen = (dict(zip(_KIND, kind, strict=True)) for kind in self._kinds)
        return sorted({kind["view"] for kind in seen if kind["index"] is not None} - {"default"})

    def seen_through(self, view: str) -> Scores:
        """S (T+1, T) through another view, by the metrics that are the tasks' headlines."""
        kinds = [dict(zip(_KIND, kind, strict=True)) for kind in self._kinds]
        signs = {(k["index"], k["metric"]): 1 if k["higher_is_better"] else -1 for k in kinds if k["headline"]}
        signs_T = np.ones(len(self._names))
        for (index, _), sign in signs.items():
            signs_T[index] = sign
        return signs_T * self.values(lambda cell: cell.view == view and (cell.index, cell.metric) in signs)

    def scores(self) -> Scores:
        """S (T+1, T): the headline metric of each task, signed so that higher is better."""
        table = np.full((len(self._names) + 1, len(self._names)), np.nan)
        for row, found in self._headlines.items():
            table[row, : len(found)] = found
        return table

    def moved(self) -> bool:
        """Whether training changed anything: a step was taken, and some score, of any metric through any view, is not
        what it was in the first row. Where nothing moved (`ZeroShot`, `Truncation`), nothing was there to forget."""
        if not self._rows or not self.steps()[-1]:
            return False
        (_, at, before), *later = (self._rows[row] for row in self.rows())
        if not later:
            return True
        for _, places, numbers in later:
            _, first, now = np.intersect1d(at, places, return_indices=True)
            if not len(now) or not np.array_equal(before[first], numbers[now], equal_nan=True):
                return True
        return False

    def forgetting_by_task(self, now: Sequence[Cell] | None = None) -> dict[str, float]:
        """`forgetting_max` of each task trained before the last row, or as of the cells `now`; of none where nothing
        moved, since nothing was learned."""
        scores, rows = self.scores(), self.rows()
        if not rows or rows[-1] < 1 or (now is None and not self.moved()):
            return {}
        last = rows[-1]
        if now is not None:
            current = headline_scores(now)
            trained = range(last)
        else:
            current, trained = scores[last], range(last - 1)
        best = {k: np.nanmax(scores[k + 1 : last + (now is not None), k], initial=-np.inf) for k in trained}
        names = self.tasks()
        return {names[k]: float(best[k] - current[k]) for k in trained if np.isfinite(best[k] - current[k])}

    def as_curve(self) -> Curve:
        """The rows as points of a curve."""
        return [(self._rows[row][0], self._headlines[row]) for row in self.rows()]

    def to_rows(self) -> list[dict[str, Any]]:
        """The table as plain data: one mapping a score."""
        return [
            {"row": row, "step": self._rows[row][0], **asdict(cell)} for row in self.rows() for cell in self.cells(row)
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> ResultTable:
        """The inverse of `to_rows`."""
        table, names = cls(), [f.name for f in fields(Cell)]
        found: dict[int, tuple[int, list[Cell]]] = {}
        for entry in rows:
            step, cells = found.setdefault(entry["row"], (entry["step"], []))
            cells.append(Cell(**{name: entry[name] for name in names}))
        for row, (step, cells) in found.items():
            table.add(row, step, cells)
        return table

    def state_dict(self) -> dict[str, Any]:
        """The table as tensors and plain data, small enough for every checkpoint of a long stream."""
        from torch import from_numpy  # whoever only reads and compares tables need not wait for torch

        rows = [(row, *self._rows[row]) for row in self.rows()]
        return {
            "kinds": [list(kind) for kind in self._kinds],
            "rows": [(row, step, len(places)) for row, step, places, _ in rows],
            "places": from_numpy(np.concatenate([places for *_, places, _ in rows] or [np.zeros(0, np.int64)])),
            "numbers": from_numpy(np.concatenate([numbers for *_, numbers in rows] or [np.zeros((0, 3))])),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ResultTable:
        """The inverse of `state_dict`."""
        table, start = cls(), 0
        table._kinds = {tuple(kind): place for place, kind in enumerate(state["kinds"])}
        for row, step, count in state["rows"]:
            part = slice(start, start + count)
            table._rows[row] = (step, state["places"][part].numpy(), state["numbers"][part].numpy())
            table._note(row, table.cells(row))
            start += count
        return table

    def to_csv(self, path: Path) -> None:
        """Write one line a score."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["row", "step", *(f.name for f in fields(Cell))])
            writer.writeheader()
            writer.writerows(self.to_rows())

    @classmethod
    def from_csv(cls, path: Path) -> ResultTable:
        """The inverse of `to_csv`."""
        with path.open(newline="") as file:
            return cls.from_rows([_typed(entry) for entry in csv.DictReader(file)])


def headline_scores(cells: Sequence[Cell]) -> Scores:
    """S of every task (T,), signed so that higher is better; NaN where not measured."""
    found = np.full(1 + max((c.index for c in cells if c.index is not None), default=-1), np.nan)
    for cell in cells:
        if cell.headline and cell.index is not None:
            found[cell.index] = cell.value if cell.higher_is_better else -cell.value
    return found


def _typed(entry: Mapping[str, str]) -> dict[str, Any]:
    numbers = {name: float(entry[name]) for name in ("value", "total", "count")}
    truths = {name: entry[name] == "True" for name in ("higher_is_better", "headline")}
    index = int(entry["index"]) if entry["index"] else None
    return dict(entry) | numbers | truths | {"row": int(entry["row"]), "step": int(entry["step"]), "index": index}
