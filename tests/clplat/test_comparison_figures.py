"""Figures that compare: points, fronts, intervals and ranks stand where their numbers are."""

from __future__ import annotations

import math

import pytest

from clplat.comparison_figures import (
    Ablated,
    Panel,
    ablation_bars,
    paired_differences,
    quantity,
    rank_figure,
    score_and_costs,
)
from clplat.figures import look
from clplat.metrics import Interval

NAN = math.nan


def known(mean: float, half: float = 0.01, n: int = 5) -> Interval:
    return Interval(mean=mean, half=half, n=n)


def test_a_point_of_one_seed_has_no_interval_and_still_stands() -> None:
    point = known(0.5, NAN, 1)
    (axis,) = score_and_costs({"naive": point}, {"seconds": {"naive": point}}).axes
    assert axis.lines[-1].get_xdata() == [0.5]


def test_every_cost_has_a_panel_and_the_front_is_of_those_that_may_compete() -> None:
    scores = {"naive": known(0.2), "er": known(0.8), "der": known(0.7), "joint": known(0.9), "lost": known(NAN)}
    first = {"naive": known(1.0), "er": known(2.0), "der": known(3.0), "joint": known(1.0), "lost": known(1.0)}
    second = {variant: known(5.0) for variant in scores}
    figure = score_and_costs(scores, {"operations": first, "bytes": second}, ["joint"])
    for axis, front in zip(figure.axes, ([[1.0, 2.0], [0.2, 0.8]], None), strict=True):
        stairs = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
        assert [[list(values) for values in line.get_data()] for line in stairs] == ([front] if front else [])
    assert not figure.axes[0].texts, "names stand in the legend, where they lie on nothing"
    marks = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert marks.keys() == {"naive", "er", "der", "joint"}, "one entry of the legend each, none for what has no score"
    assert marks["joint"].get_markerfacecolor() == "white" != marks["er"].get_markerfacecolor()


def test_quantities_are_short() -> None:
    assert [quantity(v) for v in (0.0, 12.5, 26400, 7e9, 2e15)] == ["0", "12.5", "26.4k", "7G", "2P"]


def test_differences_are_full_where_an_interval_of_five_seeds_leaves_zero_out() -> None:
    gaps = {"er": known(0.5, 0.1), "ewc": known(0.05, 0.1), "der": known(0.5, 0.1, n=3), "gone": known(NAN, NAN, 0)}
    seeds = {variant: [gap.mean] * gap.n for variant, gap in gaps.items()}
    panel = Panel(label="final score", by_seed=seeds, differences=gaps)
    figure = paired_differences([panel, panel], list(gaps), {"er": 1, "ewc": 2, "der": 3, "gone": 4})
    left, right = figure.axes
    means = [bar.lines[0] for bar in left.containers]
    assert [line.get_ydata()[0] for line in means] == [0, 1, 2]
    assert [line.get_markerfacecolor() == "white" for line in means] == [False, True, True]
    assert [line.get_color() for line in means] == [look(number)["color"] for number in (1, 2, 3)]
    small = [points for points in left.collections if points.get_offsets().shape[0] > 1]
    assert [points.get_offsets()[:, 0].tolist() for points in small] == [[0.5] * 5, [0.05] * 5, [0.5] * 3]
    assert [text.get_text() for text in right.get_yticklabels()] == [""] * 4


def test_ablation_bars_are_sorted_and_their_parts_end_at_the_whole() -> None:
    found = [
        Ablated(variant="worse", total=known(-0.2), learned=-0.05, kept=-0.15),
        Ablated(variant="joint", total=known(0.7), learned=NAN, kept=NAN),
        Ablated(variant="best", total=known(0.8), learned=-0.1, kept=0.9),
    ]
    (axis,) = ablation_bars(found, "naive").axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["best", "joint", "worse"]
    bars = {(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches}
    ends = {(round(y), round(a, 6), round(b, 6)) for y, a, b in bars}
    assert ends == {(0, 0.0, -0.1), (0, 0.0, 0.9), (1, 0.0, 0.7), (2, 0.0, -0.05), (2, -0.05, -0.2)}
    legend = [text.get_text() for text in axis.figure.legends[0].get_texts()]
    assert legend == ["learned at first", "kept or gained since", "parts unknown", "whole difference"]


def test_ranks_stand_best_first_with_half_a_critical_difference_to_both_sides() -> None:
    (axis,) = rank_figure({"a": 2.5, "b": 1.0}, 1.2, {"a": 0, "b": 1}, 6).axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["b  1.00", "a  2.50"]
    segments = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axis.containers]
    assert segments == [pytest.approx([0.4, 1.6]), pytest.approx([1.9, 3.1])]
