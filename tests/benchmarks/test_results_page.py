"""A results page: what is written by hand stays, and what is wrong is said without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from records import Made

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "results_page.py"
MARKS = ("<!-- generated: begin -->", "<!-- generated: end -->")


def written(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("mark", MARKS)
def test_a_page_with_one_marker_is_refused_and_left_as_it_is(mark: str) -> None:
    text = f"By hand.\n{mark}\nMore by hand.\n"
    Path("page.md").write_text(text)
    done = written("digits", "page.md", "--uri", "sqlite:///none.db")
    assert done.returncode == 1 and "page.md: has one of the two marker lines" in done.stderr
    assert Path("page.md").read_text() == text


def test_a_task_too_short_for_a_logged_loss_takes_none_of_another_task(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = Made(store, ["naive"], [0])
    rows = [[2.0, 2.0], [1.5, 2.0], [1.75, 1.25]]
    made.run("naive", 0, rows, higher=False, steps={"train/loss": {10: 0.5}})
    assert written("digits", "page.md", "--uri", store).returncode == 0
    table = Path("page.md").read_text().partition("### Train loss")[2].partition("###")[0]
    assert "| naive | a | 0.500 | 1.500 | 1.000 |" in table and "| naive | b |" not in table


def test_what_stands_outside_the_markers_is_kept_and_an_unknown_study_is_named(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = Made(store, ["naive"], [0])
    made.run("naive", 0, [[0.5, 0.5], [0.9, 0.5], [0.1, 0.9]])
    Path("page.md").write_text(f"Above.\n{MARKS[0]}\nold\n{MARKS[1]}\nBelow.\n")
    assert written("digits", "page.md", "--uri", store).returncode == 0
    text = Path("page.md").read_text()
    assert not (made.folder / "report.html").exists() and not Path("report.html").exists()
    assert "### What else" not in text and "### Through other views" not in text
    assert text.startswith("Above.\n") and text.endswith("Below.\n") and "old" not in text and "naive" in text
    done = written("digit", "page.md", "--uri", store)
    assert done.returncode == 1 and "has none of this name or id" in done.stderr and "Traceback" not in done.stderr


def test_what_strategies_measured_and_other_views_have_tables_of_their_own_where_there_are_any(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = Made(store, ["slow", "plain"], [0])
    rows, others = [[0.5, 0.5], [0.9, 0.5], [0.1, 0.9]], [[0.5, 0.5], [0.8, 0.5], [0.4, 0.8]]
    made.run("slow", 0, rows, views={"kept": others}, steps={"strategy/reader/ppl": {20: 7.5}})
    made.run("plain", 0, rows)
    assert written("digits", "page.md", "--uri", store).returncode == 0
    text = Path("page.md").read_text()
    assert "| reader/ppl | 7.500 | – |" in text.partition("### What else")[2].partition("###")[0]
    assert "| slow | kept | 0.600 | 0.800 | 0.400 | 0.100 |" in text.partition("### Through other views")[2]


def test_parts_of_a_study_in_several_databases_stand_together_and_no_run_twice(tmp_path: Path) -> None:
    stores = [f"sqlite:///{tmp_path / name}.db" for name in ("one", "two")]
    rows = [[0.5, 0.5], [0.9, 0.5], [0.1, 0.9]]
    for store, (variant, seed) in zip(stores, [("naive", 0), ("replay", 1)], strict=True):
        Made(store, [variant], [seed]).run(variant, seed, rows, steps={"train/loss": {10: 0.5}})
    assert written("digits", "page.md", "--uri", *stores).returncode == 0
    text = Path("page.md").read_text()
    assert "| naive | 1 |" in text and "| replay | 1 |" in text and "| replay | a | 0.500 |" in text
    done = written("digits", "page.md", "--uri", stores[0], stores[0])
    assert done.returncode == 1 and "two of the databases have variant 'naive' with seed 0" in done.stderr
