"""Figures: every value is drawn where it belongs, and every variant can be told from the others."""

from __future__ import annotations

import numpy as np
import pytest

from clplat.figures import (
    draw_front,
    filled,
    final_scores,
    forgetting_curves,
    heat_maps,
    is_cut,
    learned_and_lost,
    limits_of,
    look,
    new_figure,
)
from clplat.metrics import Interval

SCORES = np.array([[np.nan, np.nan], [0.9, np.nan], [0.3, 0.8]])


def test_a_heat_map_shows_every_measured_score_once_on_one_scale_for_all_variants() -> None:
    figure = heat_maps({"a": SCORES, "b": SCORES / 3}, {"a": ["x", "y"], "b": ["y", "x"]})
    first, second = figure.axes[:2]
    assert [text.get_text() for text in first.texts] == ["0.90", "0.30", "0.80"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["y", "x"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == pytest.approx((0.1, 0.9))
    (large,) = heat_maps({"a": -16 * SCORES}, {"a": ["x", "y"]}).axes[:1]
    assert [text.get_text() for text in large.texts] == ["-14.4", "-4.80", "-12.8"], "none is wider than its cell"
    assert limits_of([np.full((2, 2), np.nan)]) == (0.0, 1.0) and limits_of([np.ones((2, 1))]) == (0.5, 1.5)


def test_the_forgetting_line_is_the_mean_over_seeds_also_where_their_points_differ() -> None:
    one = np.array([1.5, 2.0]), np.array([0.2, 0.4])
    two = np.array([2.0]), np.array([0.8])
    (axis,) = forgetting_curves({"joint": [], "naive": [one, two]}).axes
    (line, *_) = axis.lines
    assert line.get_xdata().tolist() == [1.5, 2.0] and line.get_ydata() == pytest.approx([0.5, 0.6])
    assert line.get_color() == look(1)["color"]


def test_sixty_four_variants_can_be_told_apart() -> None:
    assert len({tuple(look(number).values()) for number in range(64)}) == 64


def test_eight_variants_can_be_told_apart_without_colour_in_lines_and_in_bars() -> None:
    lines = {(look(number)["marker"], look(number)["linestyle"]) for number in range(8)}
    assert len(lines) == len({filled(number)["hatch"] for number in range(8)}) == 8
    (axis,) = final_scores({name: {"x": Interval(mean=0.5, half=0.1, n=3)} for name in "ab"}).axes
    assert len({bar.get_hatch() for bar in axis.patches}) == 2


def test_the_front_is_a_stair_through_those_that_nothing_beats_whichever_way_is_better() -> None:
    _, (axis,) = new_figure(2, 2)
    places = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4)]
    assert draw_front(axis, places) == [True, True, False]
    assert [list(values) for values in axis.lines[0].get_data()] == [[1.0, 3.0], [0.5, 0.9]]
    assert draw_front(axis, places, across=1, up=-1) == [True, False, True]
    assert axis.lines[0].get_drawstyle() == "steps-post" and axis.lines[1].get_drawstyle() == "steps-pre"
    draw_front(axis, [(1.0, 1.0)])
    assert len(axis.lines) == 2, "one point is no front"


def test_bars_of_losses_grow_upwards_from_zero() -> None:
    (axis,) = final_scores({"naive": {"x": Interval(mean=-2.0, half=float("nan"), n=1)}}).axes
    assert axis.yaxis_inverted() and "loss" in axis.get_ylabel()
    assert [bar.get_height() for bar in axis.patches] == [-2.0]


def test_who_learned_nothing_stands_left_of_who_learned_and_arms_without_either_score_are_left_out() -> None:
    def point(lost: float, learned: float) -> tuple[Interval, Interval]:
        return tuple(Interval(mean=mean, half=0.01, n=3) for mean in (lost, learned))

    nothing = point(float("nan"), float("nan"))
    figure = learned_and_lost({"frozen": point(0.0, 0.2), "joint": nothing, "naive": point(0.6, 0.9)})
    (axis,) = figure.axes
    found = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0], line.get_color()) for line in axis.lines
             if not line.get_label().startswith("_")}  # fmt: skip
    assert found == {"frozen": (0.2, 0.0, look(0)["color"]), "naive": (0.9, 0.6, look(2)["color"])}


def test_points_that_coincide_are_all_seen_the_later_ones_larger_and_behind() -> None:
    far, near = Interval(mean=0.2, half=0.01, n=3), Interval(mean=0.9, half=0.01, n=3)
    (axis,) = learned_and_lost({"naive": (near, near), "ewc": (near, near), "er": (far, far)}).axes
    naive, ewc, er = (line for line in axis.lines if not line.get_label().startswith("_"))
    assert ewc.get_markersize() >= naive.get_markersize() + 4 and ewc.get_zorder() < naive.get_zorder()
    assert er.get_markersize() == naive.get_markersize()
    assert {line.get_markersize() for line in axis.figure.legends[0].get_lines()} == {6.0}


def test_an_interval_has_no_end_mark_where_it_is_cut() -> None:
    wide, narrow = Interval(mean=0.9, half=0.3, n=3), Interval(mean=0.5, half=0.1, n=3)
    (axis,) = learned_and_lost({"er": (narrow, wide)}).axes
    ends = {(line.get_marker(), round(float(line.get_xdata()[0]), 6), round(float(line.get_ydata()[0]), 6))
            for line in axis.lines if line.get_marker() in ("|", "_")}  # fmt: skip
    assert ends == {("|", 0.6, 0.5), ("_", 0.9, 0.4), ("_", 0.9, 0.6)}
    (across, _) = axis.containers[0].lines[2]
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([0.6, 1.0])
    # What is lost of accuracies is at most 1 too.
    far = Interval(mean=0.8, half=0.5, n=2)
    (axis,) = learned_and_lost({"er": (far, narrow)}).axes
    (_, up) = axis.containers[0].lines[2]
    assert up.get_segments()[0][:, 1].tolist() == pytest.approx([0.3, 1.0])
    assert is_cut(wide, (0.0, 1.0)) and not is_cut(narrow, (0.0, 1.0))
    assert not is_cut(Interval(mean=0.9, half=float("nan"), n=1), (0.0, 1.0))
