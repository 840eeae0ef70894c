"""Pictures of a search: its objectives against each other, its course, and the gain seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clplat.comparison_figures import quantity
from clplat.figures import PALETTE, draw_front, name_above, new_figure
from clplat.tuning.front import Row
from clplat.tuning.gain import Gain
from clplat.tuning.words import COSTS, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
"""Panels beside each other: MLflow shows pictures as wide as they are, and text beside them no narrower."""


def front_figure(rows: Sequence[Row], objectives: Mapping[str, int]) -> Figure:
    """The first objective against each other one, front and default marked; of one objective its course over trials."""
    names = list(objectives)
    if len(names) == 1:
        return course_figure(rows, names[0], objectives[names[0]])
    panels = len(names) - 1
    columns = min(COLUMNS, panels)
    figure, axes = new_figure(5.4 if panels == 1 else 6.2, 3.4 * -(-panels // columns), panels, columns)
    finished = [row for row in rows if row.objectives]
    for axis, other in zip(axes, names[1:], strict=True):
        marked: dict[str, tuple[list[Row], dict[str, object]]] = {
            "trial": (finished, {"color": PALETTE[7], "marker": "o", "s": 22}),
            "front": ([r for r in finished if r.on_front], {"color": PALETTE[0], "marker": "s", "s": 34}),
            "default": ([r for r in finished if r.is_default], {"color": PALETTE[1], "marker": "D", "s": 46}),
        }
        draw_front(
            axis, [(r.objectives[other], r.objectives[names[0]]) for r in finished], objectives[other],
            objectives[names[0]],
        )  # fmt: skip
        for label, (points, style) in marked.items():
            places = [r.objectives[other] for r in points], [r.objectives[names[0]] for r in points]
            axis.scatter(*places, label=label if axis is axes[0] else None, **style)
        for row in finished:
            if row.on_front:
                at = (row.objectives[other], row.objectives[names[0]])
                axis.annotate(row.name, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        if other in COSTS:
            axis.xaxis.set_major_formatter(lambda value, _: quantity(value))
        axis.set(
            xlabel=_with_direction(other, objectives[other]), ylabel=_with_direction(names[0], objectives[names[0]])
        )
    name_above(figure)
    return figure


def _with_direction(name: str, direction: int) -> str:
    return f"{named(name)} ({'higher' if direction > 0 else 'lower'} is better)"


def course_figure(rows: Sequence[Row], name: str, direction: int) -> Figure:
    """An objective by trial, and the best so far; trials that were pruned or failed stand below."""
    figure, (axis,) = new_figure(5.4, 3.4)
    finished = [row for row in rows if row.objectives]
    numbers, values = [row.number for row in finished], [row.objectives[name] for row in finished]
    best = np.maximum.accumulate(values) if direction > 0 else np.minimum.accumulate(values)
    axis.scatter(numbers, values, color=PALETTE[7], s=22, label="finished")
    axis.step(numbers, best, where="post", color=PALETTE[0], label="best so far")
    default = [row for row in finished if row.is_default]
    axis.scatter([r.number for r in default], [r.objectives[name] for r in default], color=PALETTE[1], marker="D", s=46,
                 label="default")  # fmt: skip
    _ticks_below(axis, rows, "PRUNED", PALETTE[2])
    _ticks_below(axis, rows, "FAILED", PALETTE[3])
    axis.set(xlabel="trial", ylabel=_with_direction(name, direction))
    axis.xaxis.get_major_locator().set_params(integer=True)
    name_above(figure)
    return figure


def _ticks_below(axis: Axes, rows: Sequence[Row], state: str, colour: str) -> None:
    places = [row.number for row in rows if row.state == state]
    if places:
        mark = "|" if state == "PRUNED" else "x"
        axis.plot(places, [0.02] * len(places), mark, color=colour, transform=axis.get_xaxis_transform(),
                  label=state.lower(), markersize=8)  # fmt: skip


def gain_figure(gains: Sequence[Gain]) -> Figure:
    """best − default of each metric: a point a seed, and the mean with its 95 % interval."""
    columns = min(COLUMNS, len(gains))
    figure, axes = new_figure(0.6 + 2.8 * columns, 2.7 * -(-len(gains) // columns), len(gains), columns)
    for axis, gain in zip(axes, gains, strict=True):
        found = gain.difference
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.scatter([0] * len(gain.by_seed), list(gain.by_seed.values()), color=PALETTE[7], s=18)
        axis.errorbar(
            [0.25], [found.mean], yerr=None if np.isnan(found.half) else [found.half], fmt="D", color=PALETTE[0],
            capsize=4,
        )  # fmt: skip
        axis.set_xticks([0, 0.25], ["seeds", "mean"])
        axis.set_xlim(-0.2, 0.45)
        axis.set_title(named(gain.metric), fontsize=9)
        axis.set_ylabel("best − default")
    return figure
