"""Figures of runs and studies, in colours that colour-blind readers can tell apart (Okabe & Ito)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clplat.metrics import Curve, Interval, ResultTable, Scores, forgetting_max

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` panels side by side, drawn without a window and without global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "clplat", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def heat_map(axis: Axes, scores: Scores, tasks: Sequence[str], title: str, limits: tuple[float, float]) -> None:
    """The result table: a row for each task trained, a column for each task scored; the diagonal is framed."""
    rows, columns = scores.shape
    axis.imshow(scores, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto")
    if rows <= 12:
        middle = sum(limits) / 2
        for i, j in np.ndindex(rows, columns):
            if np.isfinite(scores[i, j]):
                colour = "white" if scores[i, j] < middle else "black"
                axis.text(j, i, f"{scores[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=7)
        axis.set_xticks(range(columns), [short(task) for task in tasks], rotation=40, ha="right", fontsize=7)
        axis.set_yticks(range(rows), ["before", *(f"after {n + 1}" for n in range(rows - 1))], fontsize=7)
        _frame_diagonal(axis, columns)
    axis.set_title(title, fontsize=9)
    axis.spines[:].set_visible(False)


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
    figure, axes = new_figure(1.0 + 2.6 * len(tables), 2.9, len(tables))
    for axis, (variant, table) in zip(axes, tables.items(), strict=True):
        heat_map(axis, table, tasks[variant], variant, scale)
    bar = figure.colorbar(axes[-1].images[0], ax=axes, shrink=0.8)
    bar.set_label("score (higher is better)")
    return figure


def forgetting_curves(tables: Mapping[str, Sequence[Scores]]) -> Figure:
    """Mean `forgetting_max` over earlier tasks after each boundary, with the spread over seeds."""
    figure, (axis,) = new_figure(5.4, 3.2)
    for number, (variant, seeds) in enumerate(tables.items()):
        lines = np.array([[np.mean(forgetting_max(s)[i, : i - 1]) for i in range(2, len(s))] for s in seeds])
        if lines.size == 0 or not np.isfinite(lines).any():
            continue
        places, mean = np.arange(2, 2 + lines.shape[1]), lines.mean(0)
        colour, marker = PALETTE[number % 8], MARKERS[number % 8]
        axis.plot(places, mean, color=colour, marker=marker, label=variant)
        axis.fill_between(places, lines.min(0), lines.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xlabel="tasks trained", ylabel="forgetting (mean over earlier tasks)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
    return figure


def score_and_cost(points: Mapping[str, tuple[Interval, Interval]], cost: str) -> Figure:
    """Final score against a cost, one point a variant with its intervals."""
    figure, (axis,) = new_figure(5.4, 3.2)
    for number, (variant, (score, price)) in enumerate(points.items()):
        spread = [0.0 if np.isnan(i.half) else i.half for i in (score, price)]
        axis.errorbar(
            price.mean, score.mean, yerr=spread[0], xerr=spread[1], color=PALETTE[number % 8],
            marker=MARKERS[number % 8], capsize=2, label=variant, linestyle="none",
        )  # fmt: skip
    axis.set(xlabel=cost, ylabel="final score (higher is better)")
    axis.legend(frameon=False, fontsize=8)
    return figure


def final_scores(scores: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Final score of every task by variant and task: a group of bars a task and a bar a variant."""
    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    figure, (axis,) = new_figure(max(5.4, 1.1 * len(tasks) + 1.5), 3.2)
    width = 0.8 / max(1, len(scores))
    lowest = min((i.mean for row in scores.values() for i in row.values() if np.isfinite(i.mean)), default=0.0)
    for number, (variant, row) in enumerate(scores.items()):
        places = np.array([tasks.index(task) for task in row]) + (number - (len(scores) - 1) / 2) * width
        spread = [0.0 if np.isnan(i.half) else i.half for i in row.values()]
        axis.bar(
            places, [i.mean for i in row.values()], width, yerr=spread, color=PALETTE[number % 8], label=variant,
            error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    axis.set_xticks(range(len(tasks)), [short(task) for task in tasks])
    axis.set(ylabel="final score (higher is better)")
    if lowest < 0:
        axis.invert_yaxis()
        axis.set(ylabel="final loss (nats; lower is better)")
        axis.yaxis.set_major_formatter(lambda value, _: f"{-value:g}")
    axis.legend(frameon=False, fontsize=8, ncols=3)
    return figure


def draw_run(table: ResultTable, curve: Curve, folder: Path) -> None:
    """A run's own pictures: its result table, and each task's score over the stream."""
    scores, tasks = table.scores(), table.tasks()
    figure, (axis,) = new_figure(1.5 + 0.7 * min(12, len(tasks)), 1.2 + 0.4 * min(12, len(tasks)))
    heat_map(axis, scores, tasks, "result table", limits_of([scores]))
    figure.savefig(folder / "heatmap.png", dpi=120)
    figure, (axis,) = new_figure(5.4, 3.2)
    whole = sorted([*curve, *zip(table.steps(), scores[table.rows()], strict=True)], key=lambda point: point[0])
    for number, task in enumerate(tasks[:8]):
        points = [(step, now[number]) for step, now in whole if np.isfinite(now[number])]
        colour = PALETTE[number % 8]
        axis.plot(
            *zip(*points, strict=True) if points else ((), ()), color=colour, marker=MARKERS[number], label=short(task)
        )
    axis.set(xlabel="optimizer steps", ylabel="score (higher is better)")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "scores.png", dpi=120)
