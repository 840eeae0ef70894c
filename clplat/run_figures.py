"""A run's own pictures, heat map and scores over the stream, drawn with Pillow.

Every run of a study has them, and matplotlib takes a tenth of a second of CPU time for two, most of what recording a
short run cost; drawn by hand they take a tenth of that and look the same. Lengths are inches and points as in
matplotlib's figures, colours and markers are those of the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clplat.figures import PALETTE, limits_of, look, short
from clplat.metrics import whole_curve
from clplat.result_table import Curve, ResultTable, Scores

DPI = 120
FINE = 2
"""Slanted lines are drawn so much larger and made smaller then, since Pillow draws them without grey edges."""
DASHES = {"--": (3.7, 1.6), ":": (1.0, 1.65), "-.": (6.4, 1.6, 1.0, 1.6)}
"""Lengths of strokes and gaps in widths of the line."""
NUMBERED = 12
"""Rows of a heat map that has numbers and names; more would lie over one another."""
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def draw_run(table: ResultTable, curve: Curve, folder: Path) -> None:
    """A run's own pictures: its result table, and each task's score over the stream."""
    scores, tasks = table.scores(), table.tasks()
    pictures = {"heatmap": heat_map(scores, tasks), "scores": scores_over_stream(whole_curve(table, curve), tasks)}
    for name, picture in pictures.items():
        # Level 6, Pillow's own, makes files 10 % smaller and takes half as long again, most of the time of a picture.
        picture.save(folder / f"{name}.png", compress_level=3)


class Sheet:
    """A picture with a frame in which data are drawn; `scale` pixels are one pixel of the picture in the end."""

    def __init__(self, size: tuple[float, float], margins: tuple[float, float, float, float], scale: int = 1) -> None:
        """`size`: width and height; `margins`: left, right, bottom and top; all in inches."""
        self.scale, self.inch = scale, DPI * scale
        width, height = (round(length * DPI) * scale for length in size)
        left, right, bottom, top = (round(length * self.inch) for length in margins)
        self.left, self.top, self.right, self.bottom = left, top, width - right, height - bottom
        self.image = Image.new("RGB", (width, height), WHITE)
        self.draw = ImageDraw.Draw(self.image)

    def points(self, length: float) -> float:
        """Pixels of a length in points, 72 of which are an inch."""
        return length * self.inch / 72

    def text(
        self, x: float, y: float, text: str, size: float = 7, anchor: str = "mm", colour: Any = BLACK, angle: int = 0
    ) -> None:
        """Text of so many points at a place: by Pillow's anchor, or where it is turned by its upper right corner."""
        font = _font(round(self.points(size)))
        if not angle:
            self.draw.text((x, y), text, colour, font, anchor)
            return
        left, top, right, bottom = font.getbbox(text)
        mask = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
        ImageDraw.Draw(mask).text((1 - left, 1 - top), text, 255, font)
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        self.image.paste(colour, (round(x) - mask.width, round(y)), mask)

    def line(self, places: Sequence[tuple[float, float]], colour: Any = BLACK, width: float = 0.8) -> None:
        """A line through places, `width` in points."""
        self.draw.line(places, colour, max(1, round(self.points(width))), joint="curve")

    def finished(self) -> Image.Image:
        """The picture in its own size."""
        return self.image.reduce(self.scale) if self.scale > 1 else self.image


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    # Pillow's other way of laying out text is ten times slower, and for scripts that this font does not have.
    return ImageFont.truetype(str(name), pixels, layout_engine=ImageFont.Layout.BASIC)


@cache
def _colours() -> np.ndarray[Any, Any]:
    """The 256 colours of the heat map (256, 3)."""
    from matplotlib import colormaps

    return np.asarray(np.rint(255 * colormaps["cividis"](np.arange(256))[:, :3]), dtype=np.uint8)


@cache
def _marker(name: str) -> np.ndarray[Any, Any]:
    """The outline (n, 2) of a marker of size 1."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(name)
    (outline,) = style.get_path().transformed(style.get_transform()).to_polygons()
    return np.asarray(outline)


def heat_map(scores: Scores, tasks: Sequence[str]) -> Image.Image:
    """The result table: a row for each task trained, a column for each task scored; the diagonal is framed.

    What was not measured is white.
    """
    (rows, columns), (low, high) = scores.shape, limits_of([scores])
    shown = min(12, columns)
    sheet = Sheet((1.5 + 0.7 * shown, 1.4 + 0.4 * shown), (0.75, 0.1, 0.9, 0.25))
    known = np.isfinite(scores)
    place = np.where(known, (np.where(known, scores, low) - low) / (high - low), 0.0)
    cells = np.where(known[..., None], _colours()[np.minimum(255, (256 * place).astype(int))], np.uint8(255))
    size = sheet.right - sheet.left, sheet.bottom - sheet.top
    sheet.image.paste(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST), (sheet.left, sheet.top))
    sheet.text((sheet.left + sheet.right) / 2, sheet.top / 2, "result table", size=9)
    if rows <= NUMBERED:
        _write_numbers(sheet, scores, tasks, (low + high) / 2)
    return sheet.finished()


def _write_numbers(sheet: Sheet, scores: Scores, tasks: Sequence[str], middle: float) -> None:
    """Every score in its cell, names of rows and columns, and the frame of what had just been trained."""
    rows, columns = scores.shape
    across = np.linspace(sheet.left, sheet.right, columns + 1)
    down = np.linspace(sheet.top, sheet.bottom, rows + 1)
    centre, row_centre = (across[:-1] + across[1:]) / 2, (down[:-1] + down[1:]) / 2
    tick = sheet.points(3.5)
    for i, j in np.argwhere(np.isfinite(scores)):
        colour = WHITE if scores[i, j] < middle else BLACK
        sheet.text(centre[j], row_centre[i], f"{scores[i, j]:.2f}", colour=colour)
    for i, y in enumerate(row_centre):
        sheet.line([(sheet.left - tick, y), (sheet.left - 1, y)])
        sheet.text(sheet.left - 2 * tick, y, f"after {i}" if i else "before", anchor="rm")
    for j, (x, task) in enumerate(zip(centre, tasks, strict=True)):
        sheet.line([(x, sheet.bottom + 1), (x, sheet.bottom + tick)])
        sheet.text(x + tick, sheet.bottom + 2 * tick, short(task), angle=40)
        if j + 1 < rows:
            corners = (across[j], down[j + 1], across[j + 1] - 1, down[j + 2] - 1)
            sheet.draw.rectangle(corners, outline=PALETTE[1], width=round(sheet.points(1.2)))


def scores_over_stream(curve: Curve, tasks: Sequence[str]) -> Image.Image:
    """The score of each of the first eight tasks over optimizer steps."""
    sheet = Sheet((5.4, 3.2), (0.7, 0.1, 0.5, 0.5), FINE)
    lines = [
        np.array([(step, now[number]) for step, now in curve if np.isfinite(now[number])]).reshape(-1, 2)
        for number in range(len(tasks[:8]))
    ]
    every = np.concatenate(lines)
    places = [
        _axis(sheet, every[:, 0], "optimizer steps", is_upright=False),
        _axis(sheet, every[:, 1], "score (higher is better)", is_upright=True),
    ]
    for number, (points, task) in enumerate(zip(lines, tasks, strict=False)):
        style = look(number)
        x, y = (start + scale * points[:, k] for k, (start, scale) in enumerate(places))
        _plot(sheet, np.stack([x, y], 1), style)
        row, column = divmod(number, 4)
        x0 = sheet.left - 0.4 * sheet.inch + column * sheet.points(92)
        y0 = 0.18 * sheet.inch + row * sheet.points(11.5)
        key = [x0, x0 + sheet.points(7), x0 + sheet.points(14)]
        _plot(sheet, np.array([(x, y0) for x in key]), style, marked=slice(1, 2))
        sheet.text(x0 + sheet.points(19), y0, short(task), anchor="lm")
    return sheet.finished()


def _axis(sheet: Sheet, values: Scores, label: str, *, is_upright: bool) -> tuple[float, float]:
    """Draw an axis with ticks and name; where its zero lies and how many pixels one is."""
    from matplotlib.ticker import MaxNLocator

    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    first, last = (sheet.bottom, sheet.top) if is_upright else (sheet.left, sheet.right)
    scale = (last - first) / (high - low)
    start, tick, size = first - scale * low, sheet.points(3.5), 9
    corner = (sheet.left, sheet.bottom)
    sheet.line([corner, (sheet.left, sheet.top) if is_upright else (sheet.right, sheet.bottom)])
    ticks = [value for value in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= value <= high]
    written = [np.format_float_positional(value, 10, trim="-") for value in ticks]
    decimals = max((len(text.partition(".")[2]) for text in written), default=0)
    for value in ticks:
        at, said = start + scale * value, f"{round(value, decimals) + 0.0:.{decimals}f}"
        if is_upright:
            sheet.line([(sheet.left - tick, at), (sheet.left, at)])
            sheet.text(sheet.left - 2 * tick, at, said, size, "rm")
        else:
            sheet.line([(at, sheet.bottom), (at, sheet.bottom + tick)])
            sheet.text(at, sheet.bottom + 2 * tick, said, size, "mt")
    middle = (first + last) / 2
    if is_upright:
        length = _font(round(sheet.points(size))).getlength(label)
        sheet.text(0.2 * sheet.inch, middle - length / 2, label, size, angle=90)
    else:
        sheet.text(middle, sheet.image.height - 0.04 * sheet.inch, label, size, "mb")
    return start, scale


def _plot(sheet: Sheet, places: Scores, style: dict[str, str], marked: slice = slice(None)) -> None:
    """A line (n, 2) in pixels with its colour and dashes, and markers on those of its places that are `marked`."""
    for part in _strokes(places, style["linestyle"], sheet.points(1.5)):
        sheet.line([tuple(place) for place in part], style["color"], 1.5)
    outline = _marker(style["marker"]) * (sheet.points(4), -sheet.points(4))
    for place in places[marked]:
        sheet.draw.polygon([tuple(corner) for corner in place + outline], style["color"])


def _strokes(places: Scores, style: str, width: float) -> Iterator[Scores]:
    """The parts of a line that are drawn: all of it, or its dashes, each with the corners that lie on it."""
    if len(places) < 2:
        return
    if style not in DASHES:
        yield places
        return
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(places, axis=0).T))])
    pattern = DASHES[style]
    ends = np.cumsum(np.tile(pattern, int(along[-1] / (width * sum(pattern))) + 1)) * width
    starts = np.concatenate([[0.0], ends[:-1]])
    for start, end in zip(starts[::2], np.minimum(ends[::2], along[-1]), strict=True):
        if start < along[-1]:
            inner = along[(along > start) & (along < end)]
            at = np.concatenate([[start], inner, [end]])
            yield np.stack([np.interp(at, along, places[:, k]) for k in (0, 1)], 1)
