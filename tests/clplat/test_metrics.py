"""Metrics against tables made by hand, and against Avalanche's functions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from clplat.metrics import (
    cumulative_forgetting,
    cumulative_forgetting_curve,
    forgetting_first,
    forgetting_max,
    forgetting_over_time,
    interval,
    paired,
    summary,
    verdict,
    whole_curve,
)
from clplat.result_table import Cell, ResultTable

ACCURACY = np.array([[0.1, 0.1, 0.2], [0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.6, 0.4, 0.9]])
"""Rows: before, after task 1, 2, 3."""


def as_table(values: np.ndarray, *, higher: bool = True, view: str = "default") -> ResultTable:
    found = ResultTable()
    for row, scores in enumerate(values):
        found.add(row, 10 * row, [
            Cell(view=view, metric="m", task=f"t{k}", index=k, value=float(v), total=float(v), count=1.0,
                 higher_is_better=higher, headline=True)
            for k, v in enumerate(scores)
        ])  # fmt: skip
    return found


def test_forgetting_of_a_table_made_by_hand() -> None:
    lost = forgetting_max(ACCURACY)
    assert lost[2, 0] == pytest.approx(0.4) and lost[3, 0] == pytest.approx(0.3) and lost[3, 1] == pytest.approx(0.4)
    assert np.isnan(lost[1]).all() and np.isnan(lost[2, 1:]).all()
    found = summary(as_table(ACCURACY))
    assert found["final_score"] == pytest.approx((0.6 + 0.4 + 0.9) / 3)
    assert found["learning_score"] == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert found["final_forgetting"] == pytest.approx(0.35)
    assert found["backward_transfer"] == pytest.approx(-0.35)
    assert found["forward_transfer"] == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert found["cumulative_forgetting"] == pytest.approx(0.4 + (0.3 + 0.4) / 2)
    assert found["average_score"] == pytest.approx((0.9 + 0.65 + 1.9 / 3) / 3)


def test_a_loss_gives_the_same_numbers_as_its_negative_as_a_score() -> None:
    assert summary(as_table(-ACCURACY, higher=False)) == pytest.approx(summary(as_table(ACCURACY)))


def test_forgetting_is_negative_when_a_task_gets_better_and_max_and_first_differ_then() -> None:
    better = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.7, 0.5, 0.0], [0.6, 0.9, 0.5]])
    assert forgetting_max(better)[2, 0] == pytest.approx(-0.2)
    assert forgetting_max(better)[3, 0] == pytest.approx(0.1)
    assert forgetting_first(better)[3, 0] == pytest.approx(-0.1)
    assert cumulative_forgetting(better) == pytest.approx(-0.2 + (0.1 - 0.4) / 2)


def test_one_task_has_a_score_and_no_forgetting() -> None:
    found = summary(as_table(np.array([[0.1], [0.8]])))
    assert found["final_score"] == found["learning_score"] == pytest.approx(0.8)
    assert not any("forgetting" in name or "transfer" in name for name in found)


def test_numbers_that_do_not_apply_are_left_out() -> None:
    unseen = np.array([[np.nan, np.nan], [0.9, np.nan], [0.3, 0.8]])
    found = summary(as_table(unseen))
    assert "forward_transfer" not in found and found["final_forgetting"] == pytest.approx(0.6)
    joint = ResultTable()
    joint.add(2, 20, as_table(unseen).cells(2))
    assert summary(joint) == {"final_score": pytest.approx(0.55)}
    assert summary(ResultTable()) == {}


@pytest.mark.filterwarnings("ignore")
def test_forgetting_equals_avalanches_function() -> None:
    from avalanche.evaluation.functional import forgetting

    theirs = forgetting(ACCURACY[1:])
    ours = forgetting_first(ACCURACY)[1:]
    known = np.isfinite(ours)
    np.testing.assert_allclose(ours[known], theirs[known])
    assert (theirs[~known] == 0).all() and known.sum() == 3


def test_the_forgetting_curve_is_an_area_over_each_tasks_own_time_or_over_the_time_since_the_first_end() -> None:
    curve = [(0, [0.0, 0.0]), (10, [1.0, 0.0]), (15, [0.5, 0.5]), (20, [0.5, 1.0])]
    points = [(step, np.array(scores)) for step, scores in curve]
    own = cumulative_forgetting_curve(points, [10, 20])
    assert own == pytest.approx((0.5 * 0.5 * 5 + 0.5 * 5) / 10)
    three = [*points, (30, np.array([0.5, 0.5]))]
    own, first = (cumulative_forgetting_curve(three, [10, 20, 30], window=w) for w in ("own", "first"))
    areas = 0.5 * 0.5 * 5 + 0.5 * 15, 0.5 * 0.5 * 10
    assert own == pytest.approx((areas[0] / 20 + areas[1] / 10) / 2)
    assert first == pytest.approx((areas[0] / 20 + areas[1] / 20) / 2)
    assert math.isnan(cumulative_forgetting_curve(points, [10]))


def test_forgetting_over_time_is_forgetting_max_at_boundaries_and_in_between_it_counts_tasks_that_ended() -> None:
    found = as_table(ACCURACY)
    places, values = forgetting_over_time(whole_curve(found, ()), [10, 20, 30])
    lost = forgetting_max(ACCURACY)
    assert places.tolist() == [2, 3] and values == pytest.approx([lost[2, 0], (lost[3, 0] + lost[3, 1]) / 2])
    inside = [(15, np.array([0.95, 0.4, 0.3])), (25, np.array([0.45, 0.7, 0.5]))]
    places, values = forgetting_over_time(whole_curve(found, inside), [10, 20, 30])
    assert places.tolist() == [1.5, 2, 2.5, 3]
    assert values == pytest.approx([-0.05, 0.45, (0.5 + 0.1) / 2, (0.35 + 0.4) / 2])


def test_probes_and_other_views_stand_beside_the_table_and_do_not_enter_it() -> None:
    found = as_table(ACCURACY)
    cells = found.cells(3)
    probe = Cell(view="default", metric="m", task="probe", index=None, value=9.0, total=9.0, count=1.0,
                 higher_is_better=True, headline=False)  # fmt: skip
    slow = Cell(view="slow", metric="m", task="t0", index=0, value=0.99, total=1.0, count=1.0,
                higher_is_better=True, headline=False)  # fmt: skip
    found.add(3, 30, [*cells, probe, slow])
    assert summary(found) == summary(as_table(ACCURACY))
    assert found.matrix("m", "slow")[3, 0] == 0.99 and found.tasks() == ["t0", "t1", "t2"]


def test_a_table_survives_plain_data_and_csv(tmp_path: Path) -> None:
    found = as_table(np.where(ACCURACY == 0.2, np.nan, ACCURACY))
    assert str(ResultTable.from_rows(found.to_rows()).to_rows()) == str(found.to_rows())
    found.to_csv(tmp_path / "r.csv")
    again = ResultTable.from_csv(tmp_path / "r.csv")
    np.testing.assert_array_equal(again.scores(), found.scores())
    assert again.steps() == [0, 10, 20, 30]


def test_intervals_are_student_t_over_paired_seeds_and_few_seeds_show_a_direction_at_most() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    gap = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.5, 1: 1.5, 3: 9.0})
    assert (gap.mean, gap.half, gap.n) == (0.5, 0.0, 2) and verdict(gap) == "direction"
    assert verdict(interval([1.0])) == "single seed"
    assert verdict(interval([1.0, 1.1, 0.9, 1.0, 1.05])) == "difference"
    assert verdict(interval([1.0, -1.1, 0.9, -1.0, 0.05])) == "no difference shown"
    assert math.isnan(interval([]).mean) and str(interval([])) == "–"


def answered(rows: list[dict[str, list[float]]]) -> ResultTable:
    """Two question-answer tasks, of which `loss` leads and `accuracy` is written, one probe of multiple choice and one
    of written answers."""
    found = ResultTable()
    for row, values in enumerate(rows):
        kinds = [("loss", k, False, True, v) for k, v in enumerate(values["loss"])]
        kinds += [("accuracy", k, True, False, v) for k, v in enumerate(values["accuracy"])]
        kinds += [("bits_per_byte", k, False, False, 9.0) for k in range(2)]
        cells = [
            Cell(view="default", metric=metric, task=f"t{index}", index=index, value=value, total=value, count=1.0,
                 higher_is_better=higher, headline=headline)
            for metric, index, higher, headline, value in kinds
        ]  # fmt: skip
        for task, metric, value in (
            ("mmlu", "accuracy", values["mmlu"][0]), ("mmlu", "answer_loss", values["mmlu"][1]),
            ("meetings", "accuracy", 0.9 - 0.3 * row), ("meetings", "loss", 3.0),
        ):  # fmt: skip
            cells.append(Cell(view="default", metric=metric, task=task, index=None, value=value, total=value, count=1.0,
                              higher_is_better=metric == "accuracy", headline=False))  # fmt: skip
        found.add(row, 10 * row, cells)
    return found


QUESTIONS = [
    {"loss": [3.0, 4.0], "accuracy": [0.1, 0.2], "mmlu": [0.30, 1.4]},
    {"loss": [1.0, 4.0], "accuracy": [0.8, 0.1], "mmlu": [0.27, 1.5]},
    {"loss": [2.0, 1.5], "accuracy": [0.5, 0.6], "mmlu": [0.24, 1.9]},
]


def test_written_answers_and_ability_of_a_table_made_by_hand() -> None:
    found = summary(answered(QUESTIONS))
    assert found["final_score"] == pytest.approx(-1.75) and found["answers/final_score"] == pytest.approx(0.55)
    assert found["answers/learning_score"] == pytest.approx(0.7)
    assert found["answers/backward_transfer"] == pytest.approx(-0.3)
    assert found["answers/backward_transfer_trace"] == pytest.approx(-0.15)
    assert found["backward_transfer"] == pytest.approx(-1.0)
    assert found["ability_delta"] == pytest.approx(-0.06) and found["ability_delta_nats"] == pytest.approx(-0.5)


def test_backward_transfer_in_the_form_of_trace_is_the_same_sum_over_one_task_more() -> None:
    found = summary(as_table(ACCURACY))
    assert found["backward_transfer_trace"] == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)


def test_tables_without_written_answers_or_multiple_choice_have_no_such_numbers() -> None:
    plain = summary(as_table(ACCURACY))
    losses = summary(as_table(ACCURACY, higher=False))
    assert not [name for name in plain | losses if name.startswith(("answers/", "ability"))]
