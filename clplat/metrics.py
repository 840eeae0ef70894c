"""Scores and what they say about forgetting, each defined once (docs/metrics.md).

S is the signed headline score: rows 0..T (row 0 before training), columns tasks 1..T, higher is better, NaN
where a task cannot be answered. A loss of 2.1 nats is a score of −2.1.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

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


class ResultTable:
    """R[view, metric, i, j]: the score of task j after training through task i; row 0 is before training."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, list[Cell]]] = {}

    def add(self, row: int, step: int, cells: Sequence[Cell]) -> None:
        """Fill row `row`, measured at optimizer step `step`."""
        self._rows[row] = (step, list(cells))

    def rows(self) -> list[int]:
        """The rows that are there, in order."""
        return sorted(self._rows)

    def steps(self) -> list[int]:
        """The optimizer step of each row."""
        return [self._rows[row][0] for row in self.rows()]

    def cells(self, row: int) -> list[Cell]:
        """All scores of one row."""
        return self._rows[row][1]

    def tasks(self) -> list[str]:
        """Task names in stream order, probes left out."""
        named = {c.index: c.task for row in self.rows() for c in self.cells(row) if c.index is not None}
        return [named[index] for index in sorted(named)]

    def matrix(self, metric: str, view: str = "default") -> Scores:
        """Raw values (T+1, T) of one metric through one view; NaN where not measured."""
        return self._filled(lambda c: c.metric == metric and c.view == view, signed=False)

    def scores(self) -> Scores:
        """S (T+1, T): the headline metric of each task, signed so that higher is better."""
        return self._filled(lambda c: c.headline, signed=True)

    def _filled(self, wanted: Any, *, signed: bool) -> Scores:
        tasks = self.tasks()
        table = np.full((len(tasks) + 1, len(tasks)), np.nan)
        for row in self.rows():
            for cell in self.cells(row):
                if cell.index is not None and wanted(cell):
                    sign = -1.0 if signed and not cell.higher_is_better else 1.0
                    table[row, cell.index] = sign * cell.value
        return table

    def forgetting_by_task(self, now: Sequence[Cell] | None = None) -> dict[str, float]:
        """`forgetting_max` of each task trained before the last row, or as of the cells `now`."""
        scores, rows = self.scores(), self.rows()
        if not rows or rows[-1] < 1:
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
        return [(self._rows[row][0], headline_scores(self.cells(row))) for row in self.rows()]

    def to_rows(self) -> list[dict[str, Any]]:
        """The table as plain data: one mapping a score."""
        return [
            {"row": row, "step": self._rows[row][0], **asdict(cell)} for row in self.rows() for cell in self.cells(row)
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> ResultTable:
        """The inverse of `to_rows`."""
        table, names = cls(), [f.name for f in fields(Cell)]
        for entry in rows:
            step, cells = table._rows.setdefault(entry["row"], (entry["step"], []))
            cells.append(Cell(**{name: entry[name] for name in names}))
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


def forgetting_max(scores: Scores) -> Scores:
    """F[i, k] = max over k ≤ j < i of S[j, k], minus S[i, k]; NaN for tasks not trained before i. May be negative."""
    return _forgetting(scores, lambda column, k, i: np.max(column[k:i]))


def forgetting_first(scores: Scores) -> Scores:
    """F[i, k] = S[k, k] − S[i, k]: against the score right after training the task."""
    return _forgetting(scores, lambda column, k, i: column[k])


def _forgetting(scores: Scores, reference: Any) -> Scores:
    found = np.full(scores.shape, np.nan)
    for i in range(2, scores.shape[0]):
        for k in range(1, i):
            found[i, k - 1] = reference(scores[:, k - 1], k, i) - scores[i, k - 1]
    return found


def cumulative_forgetting(scores: Scores) -> float:
    """Σ over boundaries i ≥ 2 of the mean over k < i of `forgetting_max[i, k]`, signed."""
    table = forgetting_max(scores)
    return float(sum(np.mean(table[i, : i - 1]) for i in range(2, len(table))))


def cumulative_forgetting_curve(curve: Curve, ends: Sequence[int], *, window: Literal["own", "first"] = "own") -> float:
    """Area under the clipped forgetting curve as a fraction of the stream, mean over the tasks that have ended.

    Forgetting of a task at a step is its best score since its own end (at step `ends[k]`) minus its score now, at
    least 0. Its area is divided by the steps since its own end, or since the first task's end (`window`): the two
    readings of the "area under the forgetting curve" in the TRC² papers, which do not say which they mean.
    """
    if not curve or len(ends) < 2:
        return math.nan
    last, areas = curve[-1][0], []
    for task, end in enumerate(ends[:-1]):
        places = [float(step) for step, _ in curve if step >= end]
        column = np.array([now[task] for step, now in curve if step >= end])
        lost = np.clip(np.maximum.accumulate(column) - column, 0, None)
        span = last - (end if window == "own" else ends[0])
        areas.append(float(np.trapezoid(lost, places)) / span if span > 0 else math.nan)
    return _mean(areas)


def forgetting_over_time(curve: Curve, ends: Sequence[int]) -> tuple[Scores, Scores]:
    """Mean forgetting of the tasks that ended before each point of the curve: places in tasks trained, and values.

    A task's forgetting is its best score since its own end minus its score now, as in `forgetting_max`; a place of 2.5
    is half way through the third task.
    """
    later = [(step, now) for step, now in curve if step > ends[0]]
    values = []
    for step, now in later:
        ended = [task for task, end in enumerate(ends) if end < step]
        best = [max(then[task] for at, then in curve if ends[task] <= at < step) for task in ended]
        values.append(_mean(np.array(best) - now[ended]))
    places = np.interp([step for step, _ in later], [0, *ends], range(len(ends) + 1))
    return places, np.array(values)


def summary(table: ResultTable, curve: Curve = ()) -> dict[str, float]:
    """The numbers that stand for a run, as far as its rows go; a number that does not apply is left out.

    `curve` adds what was measured inside tasks; without it the forgetting curve has its boundary points alone.
    """
    scores, rows = table.scores(), table.rows()
    if not rows or rows[-1] == 0 or not scores.size:
        return {}
    last = rows[-1]
    part = scores[: last + 1]
    diagonal = np.array([part[k + 1, k] for k in range(last)])
    found = {"final_score": _mean(part[last, :last]), "learning_score": _mean(diagonal)}
    found["average_score"] = _mean([_mean(part[i, :i]) for i in range(1, last + 1)])
    if last > 1:
        lost = forgetting_max(part)
        found["final_forgetting"] = _mean(lost[last, : last - 1])
        found["final_forgetting_first"] = _mean(forgetting_first(part)[last, : last - 1])
        found["backward_transfer"] = -found["final_forgetting_first"]
        found["forward_transfer"] = _mean([part[k, k] - part[0, k] for k in range(1, last)])
        found["cumulative_forgetting"] = cumulative_forgetting(part)
        ends = table.steps()[1:]
        if len(ends) == last:
            whole = whole_curve(table, curve)
            found["cumulative_forgetting_curve"] = cumulative_forgetting_curve(whole, ends)
            found["cumulative_forgetting_curve_first"] = cumulative_forgetting_curve(whole, ends, window="first")
    return {name: value for name, value in found.items() if not math.isnan(value)}


def whole_curve(table: ResultTable, curve: Curve) -> Curve:
    """Scores measured inside tasks and those of the table's rows, in order."""
    points = zip(table.steps(), table.scores()[table.rows()], strict=True)
    return sorted([*curve, *points], key=lambda point: point[0])


def _mean(values: Any) -> float:
    """Mean that is NaN when any part is: half a table must not pass for a whole one."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()) if array.size else math.nan


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean, half the width of its 95 % Student t interval, and how many values it stands on."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if self.n == 0 or math.isnan(self.mean):
            return "–"
        return f"{self.mean:.3f} ± {self.half:.3f}" if self.n > 1 else f"{self.mean:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Student t interval at 95 % over independent values; the half width is NaN for fewer than two."""
    from scipy import stats

    kept = np.asarray([v for v in values if not math.isnan(v)])
    if len(kept) < 2:
        return Interval(mean=float(kept.mean()) if len(kept) else math.nan, half=math.nan, n=len(kept))
    spread = stats.t.ppf(0.975, len(kept) - 1) * kept.std(ddof=1) / math.sqrt(len(kept))
    return Interval(mean=float(kept.mean()), half=float(spread), n=len(kept))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """Interval of the differences ours − theirs over the seeds that both have."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def verdict(difference: Interval) -> str:
    """How a difference may be spoken of: fewer than five seeds show a direction at most."""
    if difference.n < 2:
        return "single seed"
    if difference.n < 5:
        return "direction"
    return "difference" if abs(difference.mean) > difference.half else "no difference shown"
