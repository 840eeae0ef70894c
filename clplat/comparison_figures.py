"""Figures that compare variants: what a score costs, paired differences, where they come from, ranks over streams."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clplat.figures import (
    PALETTE,
    draw_front,
    draw_intervals,
    look,
    name_above,
    new_figure,
    point_look,
    possible,
    rings,
)  # fmt: skip
from clplat.metrics import Interval, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.3
"""Height of a variant's row in inches."""
COST_RANGE = (0.0, np.inf)
"""What costs can be."""


def score_and_costs(
    scores: Mapping[str, Interval], costs: Mapping[str, Mapping[str, Interval]], references: Collection[str] = ()
) -> Figure:
    """Final score against each cost, with the front of those variants that no other beats in both.

    Names stand in the legend, where they lie on nothing. Reference arms are hollow and on no front: they do what a
    continual learner may not.
    """
    columns = min(3, len(costs))
    figure, axes = new_figure(1.0 + 3.6 * columns, 3.6, len(costs), columns)
    up, named = possible(list(scores.values())), set()
    for place, (axis, (cost, values)) in enumerate(zip(axes, costs.items(), strict=True)):
        known = [v for v in scores if np.isfinite(scores[v].mean + values[v].mean)]
        places = {v: (values[v].mean, scores[v].mean) for v in known}
        numbers = {variant: number for number, variant in enumerate(scores)}
        for v in known:
            draw_intervals(axis, values[v], scores[v], across=COST_RANGE, up=up, color=PALETTE[numbers[v] % 8])
        draw_front(axis, [at for v, at in places.items() if v not in references])
        for (v, at), ring in zip(places.items(), rings(list(places.values())), strict=True):
            axis.plot(*at, **point_look(numbers[v], ring, hollow=v in references), label=None if v in named else v)
            named.add(v)
        axis.set(xlabel=f"{cost} (lower is better)", ylabel="" if place % columns else "final score (higher is better)")
        axis.xaxis.set_major_formatter(lambda value, _: quantity(value))
        axis.margins(0.08)
    name_above(figure)
    return figure


def quantity(value: float) -> str:
    """A number with its thousands as letters."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Differences of every variant to the baseline in one respect: by seed, and their interval."""

    label: str
    by_seed: Mapping[str, Sequence[float]]
    differences: Mapping[str, Interval]


def paired_differences(panels: Sequence[Panel], variants: Sequence[str], numbers: Mapping[str, int]) -> Figure:
    """A row for each variant: a grey point a seed, and the mean with its 95 % interval, full where it is a difference.

    `numbers` are the variants' places in the study, by which they look the same in every figure.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(1.6 + 2.9 * columns, rows * (0.9 + ROW * len(variants)), len(panels), columns)
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        for row, variant in enumerate(variants):
            found = panel.differences[variant]
            seeds = panel.by_seed[variant]
            axis.scatter(seeds, [row - 0.24] * len(seeds), s=9, color="0.55", linewidths=0)
            if np.isfinite(found.mean):
                _with_interval(axis, found, row, numbers[variant])
        names = list(variants) if place % columns == 0 else [""] * len(variants)
        axis.set_yticks(range(len(variants)), names)
        axis.set_ylim(len(variants) - 0.5, -0.6)
        axis.set_xlabel(panel.label)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure


def _with_interval(axis: Axes, found: Interval, row: int, number: int) -> None:
    """A mean and its interval; hollow where the interval holds zero, or stands on fewer than five seeds."""
    shown = look(number) | {"linestyle": "-", "markersize": 6}
    if verdict(found) != "difference":
        shown |= {"markerfacecolor": "white"}
    half = None if np.isnan(found.half) else [found.half]
    axis.errorbar([found.mean], [row], xerr=half, capsize=3, linewidth=1.4, **shown)


@dataclass(frozen=True, kw_only=True)
class Ablated:
    """A variant's difference to the baseline, and what of it came by learning and by keeping, NaN where unknown."""

    variant: str
    total: Interval
    learned: float
    kept: float


def ablation_bars(found: Sequence[Ablated], baseline: str) -> Figure:
    """Difference in final score to the baseline, sorted: a point with its 95 % interval, and bars that are its parts.

    final score = learning score + what was lost or gained since, both as means over all tasks; so are the differences.
    """
    figure, (axis,) = new_figure(6.6, 1.3 + 1.2 * ROW * len(found))
    order = sorted(found, key=lambda one: one.total.mean, reverse=True)
    parted = [(row, one) for row, one in enumerate(order) if np.isfinite(one.learned + one.kept)]
    whole = [(row, one) for row, one in enumerate(order) if not np.isfinite(one.learned + one.kept)]
    # Parts of one sign stand one behind the other; those of two signs on both sides of zero.
    behind = [one.learned if one.learned * one.kept > 0 else 0.0 for _, one in parted]
    rows = [row for row, _ in parted]
    if parted:
        axis.barh(rows, [one.learned for _, one in parted], 0.62, color=PALETTE[5], hatch="//", edgecolor="white",
                  linewidth=0, label="learned at first")  # fmt: skip
        axis.barh(rows, [one.kept for _, one in parted], 0.62, left=behind, color=PALETTE[4], linewidth=0,
                  label="kept or gained since")  # fmt: skip
    if whole:
        axis.barh([row for row, _ in whole], [one.total.mean for _, one in whole], 0.62, color="0.8", linewidth=0,
                  label="parts unknown")  # fmt: skip
    for row, one in enumerate(order):
        half = None if np.isnan(one.total.half) else [one.total.half]
        axis.errorbar([one.total.mean], [row], xerr=half, fmt="D", color="black", capsize=3, markersize=5,
                      label=None if row else "whole difference")  # fmt: skip
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(order)), [one.variant for one in order])
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.set_xlabel(f"final score − {baseline}, paired over seeds (right is better)")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    name_above(figure)
    return figure


def rank_figure(ranks: Mapping[str, float], distance: float, numbers: Mapping[str, int], streams: int) -> Figure:
    """Mean rank of each variant over streams; bars of half a critical difference to both sides.

    Two variants differ where their bars do not meet (Demšar 2006, JMLR 7, §3.2.2: Nemenyi's test).
    """
    figure, (axis,) = new_figure(6.6, 1.1 + ROW * len(ranks))
    order = sorted(ranks, key=lambda variant: ranks[variant])
    for row, variant in enumerate(order):
        axis.errorbar([ranks[variant]], [row], xerr=[distance / 2], capsize=4, linewidth=1.4,
                      **look(numbers[variant]) | {"linestyle": "-"})  # fmt: skip
    best = ranks[order[0]] + distance / 2
    axis.axvspan(ranks[order[0]] - distance / 2, best, color="0.93", zorder=0)
    axis.set_yticks(range(len(order)), [f"{variant}  {ranks[variant]:.2f}" for variant in order])
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.set_xlabel(f"mean rank over {streams} streams (left is better); bars: critical difference {distance:.2f}")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return figure
