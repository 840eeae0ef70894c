"""A run's own pictures, heat map and scores over the stream, as SVG.

Every run of a study has them, and with matplotlib's figures they were most of what recording a short run cost (0.1 to
0.2 s of CPU time; so they take a few milliseconds). Colours, markers and lines are those of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from clplat.figures import PALETTE, limits_of, look, short
from clplat.metrics import whole_curve
from clplat.result_table import Curve, ResultTable, Scores

CELL = 68, 38
"""Width and height of a cell that has its number; cells of more tasks share the room of `NUMBERED`."""
NUMBERED = 12
"""Tasks of a heat map that has numbers and names; more would lie over one another."""
PLOT = 470, 250
"""Width and height of the frame in which scores are drawn over steps."""
DASHES = {"-": "", "--": "7 3", ":": "2 3", "-.": "9 3 2 3"}


class Picture:
    """A frame in which data are drawn, with margins around it; lengths are CSS pixels, from the frame's corner."""

    def __init__(self, size: tuple[float, float], *, left: int, right: int, above: int, below: int) -> None:
        wide, high = size[0] + left + right, size[1] + above + below
        self.root = ElementTree.Element("svg", {
            "xmlns": "http://www.w3.org/2000/svg", "width": f"{wide:g}", "height": f"{high:g}",
            "viewBox": f"{-left} {-above} {wide:g} {high:g}", "font-family": "sans-serif", "font-size": "11",
        })  # fmt: skip
        self.add("rect", x=-left, y=-above, width=wide, height=high, fill="white")

    def add(self, kind: str, text: str | None = None, **attributes: Any) -> None:
        """An element of SVG, with `_` for the hyphens of its attributes; numbers are rounded to a tenth."""
        given = {name.replace("_", "-"): value for name, value in attributes.items()}
        said = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in given.items()}
        ElementTree.SubElement(self.root, kind, said).text = text

    def text(self, x: float, y: float, text: str, *, at: str = "middle", turned: int = 0, fill: str = "black") -> None:
        """Text whose middle or end is at a place, turned by so many degrees to the left."""
        turn = {"transform": f"rotate({-turned} {x:.1f} {y:.1f})"} if turned else {}
        self.add("text", text, x=x, y=y, text_anchor=at, dominant_baseline="central", fill=fill, **turn)

    def line(self, *places: tuple[float, float], stroke: str = "black", width: float = 1, dashes: str = "") -> None:
        """A line through places."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = {"stroke_dasharray": dashes} if dashes else {}
        self.add("polyline", points=points, fill="none", stroke=stroke, stroke_width=width, **dashed)

    def save(self, file: Path) -> None:
        ElementTree.ElementTree(self.root).write(file, encoding="utf-8", xml_declaration=True)


def draw_run(table: ResultTable, curve: Curve, folder: Path) -> None:
    """A run's own pictures: its result table, and each task's score over the stream."""
    heat_map(table.scores(), table.tasks()).save(folder / "heatmap.svg")
    scores_over_stream(whole_curve(table, curve), table.tasks()).save(folder / "scores.svg")


def heat_map(scores: Scores, tasks: Sequence[str]) -> Picture:
    """The result table: a row for each task trained, a column for each task scored; the diagonal is framed.

    What was not measured is white.
    """
    (rows, columns), (low, high) = scores.shape, limits_of([scores])
    wide, tall = (side * min(1.0, NUMBERED / columns) for side in CELL)
    told = columns <= NUMBERED
    picture = Picture((wide * columns, tall * rows), left=64, right=12, above=28, below=80 if told else 12)
    picture.text(wide * columns / 2, -14, "result table")
    for i, j in np.argwhere(np.isfinite(scores)):
        colour = _colours()[min(255, int(256 * (scores[i, j] - low) / (high - low)))]
        picture.add("rect", x=j * wide, y=i * tall, width=wide, height=tall, fill=colour)
        if told:
            fill = "white" if scores[i, j] < (low + high) / 2 else "black"
            picture.text((j + 0.5) * wide, (i + 0.5) * tall, _minus(f"{scores[i, j]:.2f}"), fill=fill)
    for i in range(rows if told else 0):
        picture.text(-7, (i + 0.5) * tall, f"after {i}" if i else "before", at="end")
    for j, task in enumerate(tasks if told else ()):
        picture.text((j + 0.5) * wide + 5, rows * tall + 11, short(task), at="end", turned=40)
        if j + 1 < rows:
            picture.add("rect", x=j * wide + 1, y=(j + 1) * tall + 1, width=wide - 2, height=tall - 2, fill="none",
                        stroke=PALETTE[1], stroke_width=2)  # fmt: skip
    return picture


def scores_over_stream(curve: Curve, tasks: Sequence[str]) -> Picture:
    """The score of each of the first eight tasks over optimizer steps."""
    key_rows = -(-len(tasks[:8]) // 4)
    picture = Picture(PLOT, left=72, right=24, above=24 + 20 * key_rows, below=52)
    lines = [np.array([(step, now[number]) for step, now in curve if np.isfinite(now[number])]).reshape(-1, 2)
             for number in range(len(tasks[:8]))]  # fmt: skip
    every, (right, bottom) = np.concatenate(lines), PLOT
    (x0, a_step), (y0, a_score) = _scale(every[:, 0], 0, right), _scale(every[:, 1], bottom, 0)
    picture.line((0, 0), (0, bottom), (right, bottom))
    for value, said in _ticks(-x0 / a_step, (right - x0) / a_step):
        picture.line((x0 + a_step * value, bottom), (x0 + a_step * value, bottom + 5))
        picture.text(x0 + a_step * value, bottom + 15, said)
    for value, said in _ticks((bottom - y0) / a_score, -y0 / a_score):
        picture.line((-5, y0 + a_score * value), (0, y0 + a_score * value))
        picture.text(-8, y0 + a_score * value, said, at="end")
    picture.text(right / 2, bottom + 38, "optimizer steps")
    picture.text(-56, bottom / 2, "score (higher is better)", turned=90)
    for number, (points, task) in enumerate(zip(lines, tasks, strict=False)):
        _plot(picture, points * (a_step, a_score) + (x0, y0), number)
        x, y = -40 + 135 * (number % 4), -20 * (key_rows - number // 4)
        _plot(picture, np.array([(x, y), (x + 14, y), (x + 28, y)]), number, marked=slice(1, 2))
        picture.text(x + 36, y, short(task), at="start")
    return picture


def _scale(values: Scores, first: float, last: float) -> tuple[float, float]:
    """Where zero lies and how many pixels one is, where values fill the way from `first` to `last` but for an edge."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    scale = (last - first) / (high - low + 2 * room)
    return first - scale * (low - room), scale


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers between two values, and how they are written."""
    from matplotlib.ticker import MaxNLocator

    found = [value for value in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= value <= high]
    written = [np.format_float_positional(value, 10, trim="-") for value in found]
    decimals = max((len(text.partition(".")[2]) for text in written), default=0)
    return [(value, _minus(f"{round(value, decimals) + 0.0:.{decimals}f}")) for value in found]


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _plot(picture: Picture, places: Scores, number: int, marked: slice = slice(None)) -> None:
    """A line through places (n, 2) in pixels in the look of a number, with markers on those that are `marked`."""
    style = look(number)
    picture.line(*map(tuple, places), stroke=style["color"], width=2, dashes=DASHES[style["linestyle"]])
    for place in places[marked]:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in place + _marker(style["marker"]))
        picture.add("polygon", points=points, fill=style["color"])


@cache
def _colours() -> list[str]:
    """The 256 colours of the heat map."""
    from matplotlib import colormaps, colors

    return [colors.to_hex(colour) for colour in colormaps["cividis"](np.arange(256))]


@cache
def _marker(name: str) -> Scores:
    """The outline (n, 2) of a marker of 7 pixels."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(name)
    (outline,) = style.get_path().transformed(style.get_transform()).to_polygons()
    return np.asarray(outline) * (7, -7)
