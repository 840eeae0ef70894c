"""Figures of studies, in colours that colour-blind readers can tell apart (Okabe & Ito)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clplat.dominance import pareto
from clplat.metrics import Interval
from clplat.result_table import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")


def look(number: int) -> dict[str, str]:
    """Colour, marker and line of the variant at this place, so that it is known without its colour too; colours repeat
    after 8, with another line and marker."""
    return {
        "color": PALETTE[number % 8],
        "marker": MARKERS[(number + number // 8) % 8],
        "linestyle": LINES[(number + number // 8) % 4],
    }


def filled(number: int) -> dict[str, str]:
    """Colour and pattern of a variant's bars."""
    return {"color": PALETTE[number % 8], "hatch": HATCHES[(number + number // 8) % 8], "edgecolor": "white"}


def new_figure(width: float, height: float, panels: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows of `columns`, drawn without a window and without global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "clplat", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(-(-panels // columns), columns, number + 1) for number in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def heat_map(axis: Axes, scores: Scores, tasks: Sequence[str], title: str, limits: tuple[float, float]) -> None:
    """The result table: a row for each task trained, a column for each task scored; the diagonal is framed."""
    rows, columns = scores.shape
    axis.imshow(scores, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto")
    if rows <= 12:
        middle = sum(limits) / 2
        for i, j in np.ndindex(rows, columns):
            if np.isfinite(scores[i, j]):
                colour = "white" if scores[i, j] < middle else "black"
                axis.text(j, i, _in_cell(float(scores[i, j])), ha="center", va="center", color=colour, fontsize=7)
        axis.set_xticks(range(columns), [short(task) for task in tasks], rotation=40, ha="right", fontsize=7)
        axis.set_yticks(range(rows), ["before", *(f"after {n + 1}" for n in range(rows - 1))], fontsize=7)
        _frame_diagonal(axis, columns)
    axis.set_title(title, fontsize=9)
    axis.spines[:].set_visible(False)


def _in_cell(score: float) -> str:
    """As many places as a cell has room for."""
    return f"{score:.2f}" if abs(score) < 10 else f"{score:.1f}"


def _frame_diagonal(axis: Axes, columns: int) -> None:
    from matplotlib.patches import Rectangle

    for j in range(columns):
        axis.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=1.2))


def short(task: str) -> str:
    """A task's name cut to what fits under a column."""
    return task if len(task) <= 16 else task[:15] + "…"


def limits_of(tables: Sequence[Scores]) -> tuple[float, float]:
    """One colour scale for several tables."""
    values = np.concatenate([table[np.isfinite(table)] for table in tables] or [np.zeros(1)])
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def heat_maps(tables: Mapping[str, Scores], tasks: Mapping[str, Sequence[str]]) -> Figure:
    """Mean result tables of all variants on one colour scale, each with its own task names."""
    scale = limits_of(list(tables.values()))
    columns = min(5, len(tables))
    figure, axes = new_figure(1.0 + 2.6 * columns, 2.9 * -(-len(tables) // columns), len(tables), columns)
    for axis, (variant, table) in zip(axes, tables.items(), strict=True):
        heat_map(axis, table, tasks[variant], variant, scale)
    bar = figure.colorbar(axes[-1].images[0], ax=axes, shrink=0.8)
    bar.set_label("score (higher is better)")
    return figure


def forgetting_curves(lines: Mapping[str, Sequence[tuple[Scores, Scores]]]) -> Figure:
    """Mean forgetting of earlier tasks over the stream, by variant and seed: mean line, and the range over seeds."""
    figure, (axis,) = new_figure(5.4, 3.4)
    for number, (variant, seeds) in enumerate(lines.items()):
        if not seeds:
            continue
        # Seeds can have points at other places, where tasks end by a threshold.
        places = np.unique(np.concatenate([at for at, _ in seeds]))
        values = np.array([np.interp(places, at, lost) for at, lost in seeds])
        whole = np.isclose(places, places.round())
        axis.plot(places, values.mean(0), **look(number), label=variant, markevery=np.flatnonzero(whole).tolist())
        axis.fill_between(places, values.min(0), values.max(0), color=PALETTE[number % 8], alpha=0.15, linewidth=0)
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xlabel="tasks trained", ylabel="forgetting (mean over earlier tasks)")
    # Without a least number of ticks two tasks would be divided into tenths.
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_xlim(left=1)
    name_above(figure)
    return figure


def name_above(figure: Figure) -> None:
    """The legend above the panels, where it covers nothing; none where nothing could be drawn."""
    if any(axis.get_legend_handles_labels()[0] for axis in figure.axes):
        legend = figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8)
        for line in legend.get_lines():
            # A point may be drawn larger than others.
            line.set_markersize(6)


def draw_front(axis: Axes, places: Sequence[tuple[float, float]], across: int = -1, up: int = 1) -> list[bool]:
    """A stair through those (x, y) that no other beats, beyond which nothing was reached; which of them they are.

    `across` and `up` are 1 where higher is better and −1 where lower is.
    """
    kept = pareto(places, (across, up))
    front = sorted({place for place, on_front in zip(places, kept, strict=True) if on_front})
    if len(front) > 1:
        where = "post" if across < 0 else "pre"
        axis.step(*zip(*front, strict=True), where=where, color="0.45", linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    return kept


def learned_and_lost(points: Mapping[str, tuple[Interval, Interval]]) -> Figure:
    """Final forgetting against the learning score: who keeps by not learning stands low and far left."""
    figure, (axis,) = new_figure(5.4, 3.4)
    least, most = possible([learned for _, learned in points.values()])
    # What is lost lies between two scores.
    place_variants(axis, points, across=(least, most), up=(least - most, most - least))
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xlabel="learning score (higher is better)", ylabel="final forgetting (lower is better)")
    name_above(figure)
    return figure


def place_variants(
    axis: Axes, points: Mapping[str, tuple[Interval, Interval]], *, across: tuple[float, float], up: tuple[float, float]
) -> None:  # fmt: skip
    """One point a variant, (height, place), with its intervals cut at what values can be."""
    for number, (height, place) in enumerate(points.values()):
        draw_intervals(axis, place, height, across=across, up=up, color=PALETTE[number % 8])
    places = [(place.mean, height.mean) for height, place in points.values()]
    for number, (variant, at, ring) in enumerate(zip(points, places, rings(places), strict=True)):
        if np.isfinite(sum(at)):
            axis.plot(*at, **point_look(number, ring), label=variant)


def draw_intervals(
    axis: Axes, place: Interval, height: Interval, *, across: tuple[float, float], up: tuple[float, float], color: str
) -> None:  # fmt: skip
    """Both intervals of a point, cut at what values can be; an end that is cut has no end mark."""
    if not np.isfinite(place.mean + height.mean):
        return
    axis.errorbar(place.mean, height.mean, xerr=arms(place, across), yerr=arms(height, up), color=color, linewidth=1)
    for found, limits, mark in ((place, across, "|"), (height, up, "_")):
        for end in () if np.isnan(found.half) else (found.mean - found.half, found.mean + found.half):
            if limits[0] <= end <= limits[1]:
                at = (end, height.mean) if mark == "|" else (place.mean, end)
                axis.plot(*at, marker=mark, markersize=5, color=color, linestyle="none", zorder=2)


def is_cut(found: Interval, limits: tuple[float, float]) -> bool:
    """Whether an interval goes on beyond what values can be."""
    return bool(found.mean - found.half < limits[0] or found.mean + found.half > limits[1])


def rings(places: Sequence[tuple[float, float]]) -> list[int]:
    """How many earlier points each (x, y) would hide: those within a marker's size of it, 3 % of what all span."""
    values = np.array(places, dtype=float).reshape(-1, 2)
    known = values[np.isfinite(values).all(1)]
    near = 0.03 * np.maximum(np.ptp(known, axis=0), 1e-12) if len(known) else np.ones(2)
    return [int((np.abs(values[:number] - at) <= near).all(1).sum()) for number, at in enumerate(values)]


def point_look(number: int, ring: int, *, hollow: bool = False) -> dict[str, Any]:
    """A variant's marker; one that would hide `ring` others is larger and lies behind them, so that all are seen."""
    edge = {"markerfacecolor": "white"} if hollow else {"markeredgecolor": "white", "markeredgewidth": 0.8}
    return look(number) | {"linestyle": "none", "markersize": 7 + 5 * ring, "zorder": 5 - 0.1 * ring} | edge


def possible(scores: Sequence[Interval]) -> tuple[float, float]:
    """The values that scores like these can take: shares between 0 and 1, negated losses below 0."""
    means = np.array([score.mean for score in scores])
    means = means[np.isfinite(means)]
    if np.all(means <= 0):
        return -np.inf, 0.0
    return (0.0, 1.0) if np.all((means >= 0) & (means <= 1)) else (-np.inf, np.inf)


def arms(found: Interval, limits: tuple[float, float]) -> Scores:
    """Lengths (2, 1) of an error bar below and above the mean, cut where no value can be."""
    half = 0.0 if np.isnan(found.half) else found.half
    below, above = min(half, found.mean - limits[0]), min(half, limits[1] - found.mean)
    return np.array([[max(0.0, below)], [max(0.0, above)]])


def final_scores(scores: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Final score of every task by variant and task: a group of bars a task and a bar a variant."""
    import matplotlib

    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    figure, (axis,) = new_figure(min(20.0, max(5.4, 1.1 * len(tasks) + 1.5)), 3.4)
    width = 0.8 / max(1, len(scores))
    limits = possible([i for row in scores.values() for i in row.values()])
    lowest = min((i.mean for row in scores.values() for i in row.values() if np.isfinite(i.mean)), default=0.0)
    with matplotlib.rc_context({"hatch.linewidth": 0.6}):
        for number, (variant, row) in enumerate(scores.items()):
            places = np.array([tasks.index(task) for task in row]) + (number - (len(scores) - 1) / 2) * width
            spread = np.hstack([arms(i, limits) for i in row.values()])
            axis.bar(
                places, [i.mean for i in row.values()], width, yerr=spread, label=variant, linewidth=0,
                error_kw={"elinewidth": 0.8}, **filled(number),
            )  # fmt: skip
    slant = {"rotation": 40, "ha": "right"} if len(tasks) > 5 else {}
    axis.set_xticks(range(len(tasks)), [short(task) for task in tasks], **slant)
    axis.set(ylabel="final score (higher is better)")
    if lowest < 0:
        axis.invert_yaxis()
        axis.set(ylabel="final loss (nats; lower is better)")
        axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    name_above(figure)
    return figure


def connectivity_panels(walks: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]]) -> Figure:
    """Losses on lines between weights, a panel a line; dashed the straight line between the losses of its ends."""
    columns = min(4, len(walks))
    figure, axes = new_figure(1.0 + 2.7 * columns, 0.6 + 2.3 * -(-len(walks) // columns), len(walks), columns)
    for axis, (title, (alphas, losses)) in zip(axes, walks.items(), strict=True):
        for number, (name, values) in enumerate(losses.items()):
            axis.plot(alphas, values, **look(number), markersize=3, label=name if axis is axes[0] else None)
            axis.plot([0, 1], [values[0], values[-1]], color=PALETTE[number % 8], linestyle=":", linewidth=0.8)
        axis.set_title(title, fontsize=7)
        axis.set(xlabel="α", ylabel="loss (nats)")
    name_above(figure)
    return figure
