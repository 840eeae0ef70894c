"""A run's pictures: every score has its colour and its place, whatever the stream's length and the scores' size."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from records import cells

from clplat.figures import PALETTE
from clplat.result_table import ResultTable
from clplat.run_figures import CELL, PLOT, Picture, draw_run, heat_map, scores_over_stream

SCORES = np.array([[0.0, 0.25], [1.0, np.nan], [0.5, 0.75]])


def written(picture: Picture) -> list[tuple[str, float, float]]:
    """Every text, and where it stands."""
    return [(e.text or "", float(e.get("x", "")), float(e.get("y", ""))) for e in picture.root if e.tag == "text"]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_every_cell_has_its_scores_colour_and_number_and_what_was_not_measured_is_white() -> None:
    picture, (wide, high) = heat_map(SCORES, ["x", "y"]), CELL
    numbers = {(x, y): number(text) for text, x, y in written(picture) if "." in text}
    cells_at = {(float(e.get("x", "")), float(e.get("y", ""))): e.get("fill") for e in picture.root if e.tag == "rect"}
    for i, j in np.argwhere(np.isfinite(SCORES)):
        assert numbers.pop(((j + 0.5) * wide, (i + 0.5) * high)) == SCORES[i, j]
        colour = matplotlib.colormaps["cividis"](SCORES[i, j])
        assert cells_at.pop((j * wide, i * high)) == to_hex(colour)
    assert not numbers and (wide, high) not in cells_at, "what was not measured has neither number nor colour"
    framed = [(float(e.get("x", "")), float(e.get("y", ""))) for e in picture.root if e.get("stroke") == PALETTE[1]]
    assert framed == [(1, high + 1), (wide + 1, 2 * high + 1)]
    words = [text for text, *_ in written(picture)]
    assert [text for text in words if text.startswith(("before", "after"))] == ["before", "after 1", "after 2"]


def test_a_score_stands_at_its_step_and_height_by_the_ticks_of_the_axes() -> None:
    curve = [(0, np.array([-0.2, 0.5])), (100, np.array([0.9, np.nan])), (200, np.array([0.4, 0.8]))]
    picture = scores_over_stream(curve, ["x", "y"])
    steps = [(float(text), x) for text, x, y in written(picture) if text.isdigit() and y > PLOT[1]]
    heights = [(number(text), y) for text, x, y in written(picture) if "." in text and x < 0]
    across, up = (np.polyfit(*zip(*ticks, strict=True), 1) for ticks in (steps, heights))
    for place, points in enumerate([[(0, -0.2), (100, 0.9), (200, 0.4)], [(0, 0.5), (200, 0.8)]]):
        drawn, _ = [e for e in picture.root if e.tag == "polyline" and e.get("stroke") == PALETTE[place]]
        found = [tuple(map(float, pair.split(","))) for pair in drawn.get("points", "").split()]
        expected = [(np.polyval(across, step), np.polyval(up, score)) for step, score in points]
        np.testing.assert_allclose(found, expected, atol=0.2)
        markers = [e for e in picture.root if e.tag == "polygon" and e.get("fill") == PALETTE[place]]
        assert len(markers) == len(points) + 1, "one in the key"
    assert {text for text, *_ in written(picture)} >= {"x", "y", "optimizer steps"}


@pytest.mark.parametrize("value", [0.0, -3e-7, 1e-4, 12345.5, np.nan, np.inf])
@pytest.mark.parametrize("tasks", [1, 2, 60])
def test_a_run_of_any_length_and_scores_of_any_size_have_their_pictures(
    tasks: int, value: float, tmp_path: Path
) -> None:
    table = ResultTable()
    for row in range(tasks + 1):
        scores = [value * (row + 1)] * tasks
        table.add(row, row, cells(scores, [f"<task> & {k}" for k in range(tasks)]))
    draw_run(table, [(1, np.full(tasks, np.nan))], tmp_path)
    for name in ("heatmap.svg", "scores.svg"):
        root = ElementTree.parse(tmp_path / name).getroot()
        assert len(root) >= 2 and not {"nan", "inf"} & {part for e in root for part in e.attrib.values()}
    told = [e.text for e in ElementTree.parse(tmp_path / "scores.svg").getroot() if e.text]
    assert "<task> & 0" in told


def test_a_runs_pictures_come_without_the_machinery_of_whole_figures() -> None:
    """Its time was most of what recording a short run took."""
    import subprocess
    import sys

    code = (
        "import sys, numpy, pathlib, tempfile\n"
        "from clplat.run_figures import heat_map, scores_over_stream\n"
        "heat_map(numpy.eye(3)[:, :2], ['a', 'b'])\n"
        "scores_over_stream([(0, numpy.zeros(2)), (1, numpy.ones(2))], ['a', 'b'])\n"
        "print([name for name in ('matplotlib.figure', 'matplotlib.axes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
