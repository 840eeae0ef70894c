"""The journal: a run's append-only record, from which tables are made and MLflow is fed.

One JSON object a line. What a resumed run repeats is written once: every kind of entry has a key by which a
repetition is known (a metric's name and step, a row of the result table, a decision).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clplat.errors import StorageError
from clplat.points import cells_of
from clplat.result_table import Cell, ResultTable

NAME = "journal.jsonl"


class Journal:
    """Appends to the journal of one run folder."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises before a write when the folder is another process's by now."""
        self.folder, self._path, self._check = folder, folder / NAME, check
        self._lines: list[str] = []
        self._marks: dict[str, int] = {}
        self._known: set[str] = set()
        _cut_torn_line(self._path)
        for entry in read(folder):
            self._remember(entry)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves at an optimizer step; a name's steps at or before its last one are known already."""
        fresh = {name: value for name, value in values.items() if step > self._marks.get(name, -1)}
        if fresh:
            self._append({"kind": "metric", "step": step, "values": {n: _plain(v) for n, v in fresh.items()}})

    def results(self, row: int, step: int, cells: Sequence[Cell]) -> None:
        """One row of the result table."""
        self._append_once({"kind": "results", "row": row, "step": step, "cells": [_plain_cell(c) for c in cells]})

    def curve(self, step: int, task: int, cells: Sequence[Cell]) -> None:
        """Scores measured inside task `task`."""
        self._append_once({"kind": "curve", "step": step, "task": task, "cells": [_plain_cell(c) for c in cells]})

    def decision(self, event: str, step: int, strategy: str, knob: str, value: float, task: str) -> None:
        """What a controller changed."""
        self._append_once(
            {"kind": "decision", "event": event, "step": step, "strategy": strategy, "knob": knob, "value": value,
             "task": task}
        )  # fmt: skip

    def status(self, status: str, reason: str = "") -> None:
        """RUNNING, FINISHED, FAILED, KILLED or PRUNED from now on."""
        self._append({"kind": "status", "status": status, "reason": reason})

    def params(self, values: Mapping[str, Any]) -> None:
        """The configuration, flat; written once."""
        self._append_once({"kind": "params", "values": {name: str(value) for name, value in values.items()}})

    def tags(self, values: Mapping[str, str]) -> None:
        """Facts that stay the same; of those that change after all, the last value is kept."""
        self._append_once({"kind": "tags", "values": dict(values)})

    def dataset(self, name: str, digest: str, context: str, **about: str) -> None:
        """A set that the run reads, by its content; `about` is what MLflow shows of it: `source` and `profile`."""
        self._append_once({"kind": "dataset", "name": name, "digest": digest, "context": context} | about)

    def flush(self) -> None:
        """Write what has been appended; raises `StorageError` when there is no room, and what `check` raises."""
        self._check()
        if not self._lines:
            return
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with self._path.open("a") as file:
                file.write("".join(self._lines))
        except OSError as error:
            # The lines stay here for the next attempt; those that went through would be there twice.
            if self._path.is_file():
                os.truncate(self._path, size)
            raise StorageError(
                f"{self.folder}: the journal could not be written ({error}). Free some space, then continue with "
                f"`clplat resume {self.folder}`."
            ) from error
        self._lines.clear()

    def _append(self, entry: dict[str, Any]) -> None:
        self._remember(entry)
        self._lines.append(json.dumps({"t": int(time.time() * 1000)} | entry, allow_nan=False) + "\n")
        if len(self._lines) >= 20:
            self.flush()

    def _append_once(self, entry: dict[str, Any]) -> None:
        if _identity(entry) not in self._known:
            self._append(entry)

    def _remember(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "metric":
            self._marks |= dict.fromkeys(entry["values"], entry["step"])
        else:
            self._known.add(_identity(entry))


def _identity(entry: Mapping[str, Any]) -> str:
    """What makes two entries the same fact: scores by their place, everything else by its content."""
    if entry["kind"] in ("results", "curve"):
        return f"{entry['kind']} {entry.get('row', entry.get('task'))} {entry['step']}"
    return json.dumps({name: value for name, value in entry.items() if name != "t"}, sort_keys=True)


def _plain(value: float) -> float | str:
    """Standard JSON has no NaN and no infinity: they are written as words."""
    return float(value) if math.isfinite(value) else str(float(value))


def _plain_cell(cell: Cell) -> dict[str, Any]:
    return {name: _plain(v) if isinstance(v, float) else v for name, v in asdict(cell).items()}


def _cut_torn_line(path: Path) -> None:
    """Remove the half line that a killed writer leaves at the end."""
    if not path.is_file():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole != len(text):
        with path.open("r+b") as file:
            file.truncate(whole)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of a run's journal in order; a half line at the end is left out."""
    path = folder / NAME
    if not path.is_file():
        return
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                # Its other half may follow at this moment, and would be taken for a line.
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise StorageError(f"{path}, line {number}: damaged ({error}); remove that line and go on") from error


def table(folder: Path) -> ResultTable:
    """The result table of a run."""
    return table_of(read(folder))


def table_of(entries: Iterable[Mapping[str, Any]]) -> ResultTable:
    """The result table that a run's entries tell."""
    found = ResultTable()
    for entry in entries:
        if entry["kind"] == "results":
            found.add(entry["row"], entry["step"], cells_of(entry))
    return found


def curve_of(entries: Iterable[Mapping[str, Any]]) -> ResultTable:
    """The scores measured inside tasks, a row for each optimizer step."""
    found = ResultTable()
    for entry in entries:
        if entry["kind"] == "curve":
            found.add(entry["step"], entry["step"], cells_of(entry))
    return found


ENDED = ("FINISHED", "PRUNED")
"""With these a run is over, and is not begun or resumed again."""


def last_status(folder: Path) -> str:
    """How the run stands: WAITING before its first start, else RUNNING, FINISHED, FAILED, KILLED or PRUNED."""
    found = [entry["status"] for entry in read(folder) if entry["kind"] == "status"]
    return found[-1] if found else "WAITING"


def record_lost(folder: Path, status: str, reason: str) -> None:
    """Write the status of a run whose process died without a word."""
    journal = Journal(folder)
    journal.status(status, reason)
    journal.flush()
