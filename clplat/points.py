"""From the journal's entries to MLflow's words: metrics with our steps and times, tags, parameters, data sets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clplat.metrics import summary
from clplat.result_table import Cell, ResultTable, headline_scores

TASK_LIMIT = 50
"""Streams of more tasks than this record aggregates alone; the rest stands in results.csv."""

Point = tuple[str, float, int, int]
"""Key, value, time in ms, step."""


class Translator:
    """Keeps the result table so far, since summaries depend on all rows; fed with every entry in order."""

    def __init__(self) -> None:
        self.table = ResultTable()
        self.curve: list[tuple[int, Any]] = []
        self._latest: dict[str, float] = {}
        self._unchanged: dict[str, Point] = {}

    def points(self, entry: Mapping[str, Any]) -> Iterator[Point]:
        """The metric points of one entry; NaN and infinite values are left out.

        A constant learning rate would be half of all points: of a stretch of equal values while a task is trained the
        first and the last are points, the last when the stretch ends or the task or the run does.
        """
        if entry["kind"] in ("results", "status"):
            yield from self._unchanged.values()
            self._unchanged.clear()
        for key, value, step in self._values(entry):
            if not math.isfinite(value):
                continue
            point = safe_key(key), value, int(entry["t"]), step
            if key.startswith("train/") and self._latest.get(key) == value:
                self._unchanged[key] = point
                continue
            if key in self._unchanged:
                yield self._unchanged.pop(key)
            self._latest[key] = value
            yield point

    def _values(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
        match entry["kind"]:
            case "metric":
                yield from ((name, float(value), entry["step"]) for name, value in entry["values"].items())
            case "results":
                yield from self._results(entry)
            case "curve":
                cells = cells_of(entry)
                self.curve.append((int(entry["step"]), headline_scores(cells)))
                if len(self.curve[-1][1]) <= TASK_LIMIT:
                    yield from ((f"curve/{cell_name(c)}", c.value, entry["step"]) for c in cells)
            case "decision":
                yield f"decision/{entry['strategy']}.{entry['knob']}", float(entry["value"]), entry["step"]

    def _results(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
        cells, step = cells_of(entry), entry["step"]
        self.table.add(entry["row"], step, cells)
        if len(self.table.tasks()) <= TASK_LIMIT:
            yield from ((f"eval/{cell_name(c)}", c.value, step) for c in cells)
            forgetting = self.table.forgetting_by_task()
            yield from ((f"forgetting_max/{task}", value, step) for task, value in forgetting.items())
        yield from ((name, value, step) for name, value in summary(self.table, self.curve).items())


def cells_of(entry: Mapping[str, Any]) -> list[Cell]:
    """The scores of a results or curve entry."""
    return [
        Cell(**{**cell, **{name: float(cell[name]) for name in ("value", "total", "count")}}) for cell in entry["cells"]
    ]


def cell_name(cell: Cell) -> str:
    """`task/metric`, with the view in front where it is not the default, and `probe/` for probes."""
    view = "" if cell.view == "default" else f"{cell.view}/"
    return f"{view}{'probe/' if cell.index is None else ''}{cell.task}/{cell.metric}"


def may_have_other_views(names: Iterable[str]) -> bool:
    """Whether a run with metrics of these names may have scores of tasks through a view beside the default one: with
    at most `TASK_LIMIT` tasks they are among the names, else the result table alone knows."""
    scored = [name.split("/") for name in names if name.startswith("eval/")]
    return not scored or any(len(parts) > 3 and parts[1] != "probe" for parts in scored)


def safe_key(name: str) -> str:
    """The name with what MLflow refuses replaced: odd characters, and parts that make no plain path."""
    parts = re.sub(r"[^\w\-. /:]", "_", name)[:250].split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)
