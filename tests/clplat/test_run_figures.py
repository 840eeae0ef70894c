"""A run's pictures: every score has its colour and its place, whatever the stream's length and the scores' size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw
from records import cells

from clplat.figures import PALETTE
from clplat.result_table import ResultTable
from clplat.run_figures import DPI, draw_run, heat_map, scores_over_stream

SCORES = np.array([[0.0, 0.25], [1.0, np.nan], [0.5, 0.75]])


def colour_of(value: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in matplotlib.colormaps["cividis"](value)[:3])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    """What is written without a turn, and where."""
    found: list[tuple[str, float, float]] = []
    original = ImageDraw.ImageDraw.text

    def text(self: Any, place: tuple[float, float], text: str, *args: Any, **kwargs: Any) -> None:
        found.append((text, *place))
        original(self, place, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def test_every_cell_has_its_scores_colour_and_number_and_what_was_not_measured_is_white(
    written: list[tuple[str, float, float]],
) -> None:
    picture = heat_map(SCORES, ["x", "y"])
    left, top, right, bottom = 0.75 * DPI, 0.25 * DPI, picture.width - 0.1 * DPI, picture.height - 0.9 * DPI
    wide, high = (right - left) / 2, (bottom - top) / 3
    numbers = {(x, y): text for text, x, y in written if "." in text}
    for i, j in np.ndindex(3, 2):
        # Below the number, inside the frame.
        colour = picture.getpixel((int(left + (j + 0.5) * wide), int(top + (i + 0.85) * high)))
        expected = colour_of(SCORES[i, j]) if np.isfinite(SCORES[i, j]) else (255, 255, 255)
        assert np.abs(np.subtract(colour, expected)).max() <= 2, (i, j)
        near = [text for (x, y), text in numbers.items()
                if abs(x - left - (j + 0.5) * wide) < 2 and abs(y - top - (i + 0.5) * high) < 2]  # fmt: skip
        assert near == ([f"{SCORES[i, j]:.2f}"] if np.isfinite(SCORES[i, j]) else [])
    for j in (0, 1):
        edge = picture.getpixel((int(left + j * wide) + 1, int(top + (j + 1.5) * high)))
        assert edge == ImageColor.getrgb(PALETTE[1])
    assert [text for text, *_ in written if text.startswith(("before", "after"))] == ["before", "after 1", "after 2"]


def test_a_score_stands_at_its_step_and_height_by_the_ticks_of_the_axes(
    written: list[tuple[str, float, float]],
) -> None:
    curve = [(0, np.array([0.2, 0.5])), (100, np.array([0.9, np.nan])), (200, np.array([0.4, 0.8]))]
    picture = np.asarray(scores_over_stream(curve, ["x", "y"]), dtype=int)
    # Drawn at twice the size; ticks below the axes, and to their left.
    steps = [(float(text), x / 2) for text, x, y in written if text.isdigit()]
    heights = [(float(text), y / 2) for text, x, y in written if "." in text]
    across, up = (np.polyfit(*zip(*ticks, strict=True), 1) for ticks in (steps, heights))
    for number, points in enumerate([[(0, 0.2), (100, 0.9), (200, 0.4)], [(0, 0.5), (200, 0.8)]]):
        for step, score in points:
            x, y = np.polyval(across, step), np.polyval(up, score)
            colour = picture[round(y), round(x)]
            assert np.abs(colour - ImageColor.getrgb(PALETTE[number])).max() <= 12, (step, score)
    assert {text for text, *_ in written} >= {"x", "y", "optimizer steps"}


@pytest.mark.parametrize("value", [0.0, -3e-7, 1e-4, 12345.5, np.nan, np.inf])
@pytest.mark.parametrize("tasks", [1, 2, 60])
def test_a_run_of_any_length_and_scores_of_any_size_have_their_pictures(
    tasks: int, value: float, tmp_path: Path
) -> None:
    table = ResultTable()
    for row in range(tasks + 1):
        scores = [value * (row + 1)] * tasks
        table.add(row, row, cells(scores, [f"a task with a long name {k}" for k in range(tasks)]))
    draw_run(table, [(1, np.full(tasks, np.nan))], tmp_path)
    for name in ("heatmap.png", "scores.png"):
        with Image.open(tmp_path / name) as picture:
            colours = len(picture.getcolors(1 << 20))
        assert colours > 2, name


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
