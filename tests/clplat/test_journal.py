"""The journal: append-only, whole lines, every fact once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from clplat.errors import StorageError
from clplat.journal import NAME, Journal, last_status, read, table
from clplat.result_table import Cell

CELL = Cell(
    view="default", metric="loss", task="a", index=0, value=float("nan"), total=1.5, count=2.0,
    higher_is_better=False, headline=True,
)  # fmt: skip


def test_repeated_steps_after_a_restart_are_written_once(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    for step in (5, 10, 15):
        first.metrics(step, {"train/loss": step / 10})
    first.results(1, 15, [CELL])
    first.decision("boundary", 15, "replay", "ratio", 2.0, "a")
    first.flush()
    second = Journal(tmp_path)
    second.metrics(10, {"train/loss": 1.0, "train/new": 3.0})
    second.metrics(20, {"train/loss": 2.0})
    second.results(1, 15, [CELL])
    second.decision("boundary", 15, "replay", "ratio", 2.0, "a")
    second.flush()
    points = [(e["step"], e["values"]) for e in read(tmp_path) if e["kind"] == "metric"]
    assert points == [
        (5, {"train/loss": 0.5}), (10, {"train/loss": 1.0}), (15, {"train/loss": 1.5}),
        (10, {"train/new": 3.0}), (20, {"train/loss": 2.0}),
    ]  # fmt: skip
    assert [e["kind"] for e in read(tmp_path)].count("results") == 1
    assert [e["kind"] for e in read(tmp_path)].count("decision") == 1


def test_a_torn_last_line_is_cut_and_nothing_else_is_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    journal.flush()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"t": 1, "kind": "met')
    assert len(list(read(tmp_path))) == 1
    again = Journal(tmp_path)
    again.metrics(2, {"a": 2.0})
    again.flush()
    assert [e["step"] for e in read(tmp_path)] == [1, 2]


def test_a_line_whose_other_half_is_written_while_it_is_read_is_left_for_the_next_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's iterator yields the half that is there, and then the other half as a line of its own."""
    entry = '{"t": 1, "kind": "status", "status": "RUNNING", "reason": ""}\n'
    (tmp_path / NAME).write_text(entry)
    parts = [entry, entry[:30], entry[30:]]
    monkeypatch.setattr(Path, "open", lambda *_: contextlib.nullcontext(iter(parts)))
    assert [found["status"] for found in read(tmp_path)] == ["RUNNING"]


def test_nan_survives_as_standard_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.results(0, 0, [CELL])
    journal.flush()
    assert "NaN" not in (tmp_path / NAME).read_text().replace('"nan"', "")
    (cell,) = table(tmp_path).cells(0)
    assert cell.value != cell.value and cell.total == 1.5


def test_status_is_the_last_one_and_waiting_before_the_first(tmp_path: Path) -> None:
    assert last_status(tmp_path) == "WAITING"
    journal = Journal(tmp_path)
    for status in ("RUNNING", "KILLED", "RUNNING"):
        journal.status(status)
    journal.flush()
    assert last_status(tmp_path) == "RUNNING"


def test_a_journal_that_cannot_be_written_names_the_folder_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    original = Path.open

    def full(self: Path, *args: str, **kwargs: str) -> object:
        if self.name == NAME and args and args[0] == "a":
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match=str(tmp_path)):
        journal.flush()
    monkeypatch.undo()
    journal.flush()
    assert [e["values"] for e in read(tmp_path)] == [{"a": 1.0}]
