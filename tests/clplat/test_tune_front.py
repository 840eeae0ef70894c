"""The front, the rule that prunes, the gain in words and the page: on numbers made by hand."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console
from searches import formulas, settings, tune

from clplat.dominance import pareto
from clplat.metrics import interval
from clplat.tuning import checks, words
from clplat.tuning.figures import front_figure
from clplat.tuning.front import Row, best, front_table, table, write_csv
from clplat.tuning.gain import Gain, sentence
from clplat.tuning.page import reasons
from clplat.tuning.pruning import worse_than_most

OBJECTIVES = {"final_score": 1, "cost/training_flops": -1}
NAN = math.nan


def row(number: int, score: float | None, flops: float = 0.0, **changes: object) -> Row:
    found = {} if score is None else {"final_score": score, "cost/training_flops": flops}
    known = {"state": "FINISHED", "settings": {"a.lr": 0.1 * number, "a.kind": {"class_path": "SGD"}}, "reason": ""}
    known |= {"is_default": number == 0, "on_front": False}
    return Row(number=number, objectives=found, **known | changes)


def made() -> list[Row]:
    """Six trials: 1 and 3 on the front, 2 as good as 1 and dearer, 0 dominated, 4 pruned, 5 failed."""
    scores = {0: (0.5, 9.0), 1: (0.9, 5.0), 2: (0.9, 6.0), 3: (0.7, 1.0)}
    front = pareto(list(scores.values()), [1, -1])
    rows = [row(n, *scores[n], on_front=kept) for n, kept in zip(scores, front, strict=True)]
    return [*rows, row(4, None, state="PRUNED", reason="worse, after 2"), row(5, None, state="FAILED", reason="nan")]


def test_a_number_that_was_given_out_before_a_kill_is_no_trial_and_a_trial_that_failed_is_one() -> None:
    failed = {"state": TrialState.FAIL}
    trials = [create_trial(**failed), create_trial(**failed, user_attrs={"reason": "nan"})]
    rows = table(trials, SimpleNamespace(dimensions={"lr": None}), {"final_score": 1})  # type: ignore[arg-type]
    assert [(row.state, row.reason) for row in rows] == [("FAILED", "nan")]


def test_the_page_says_openly_why_trials_failed_and_folds_up_why_they_were_pruned() -> None:
    told = "".join(reasons(made()))
    assert told.index("1 failed") < told.index("t0005: nan") < told.index("<details><summary>1 pruned</summary>")
    assert "t0004: worse, after 2" in told.partition("<details>")[2] and not reasons(made()[:4])


def test_the_front_is_what_nothing_dominates() -> None:
    assert [r.on_front for r in made()] == [False, True, False, True, False, False]
    assert pareto([(1.0,), (2.0,), (2.0,)], [1]) == [False, True, True]
    assert pareto([(1.0, 1.0), (1.0, 1.0)], [1, -1]) == [True, True]
    assert pareto([], [1]) == []


def test_the_best_is_that_of_the_first_objective_then_the_next_then_the_earlier() -> None:
    assert best(made(), OBJECTIVES).number == 1
    turned = {"cost/training_flops": -1, "final_score": 1}
    assert best(made(), turned).number == 3
    equal = [row(0, 0.5, 1.0, on_front=True), row(1, 0.5, 1.0, on_front=True)]
    assert best(equal, OBJECTIVES).number == 0
    assert best([row(4, None)], OBJECTIVES) is None


def test_the_csv_holds_every_trial_with_its_status_and_settings(tmp_path: Path) -> None:
    write_csv(made(), list(OBJECTIVES), ["a.lr", "a.kind"], tmp_path / "front.csv")
    with (tmp_path / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["trial"] for r in rows if r["front"] == "true"] == ["t0001", "t0003"]
    assert [r["status"] for r in rows[3:]] == ["FINISHED", "PRUNED", "FAILED"]
    assert float(rows[1]["final_score"]) == 0.9 and rows[4]["final_score"] == ""
    assert rows[1]["a.kind"] == '{"class_path": "SGD"}' and rows[4]["reason"] == "worse, after 2"
    assert rows[0]["default"] == "true" and rows[1]["default"] == "false"


def test_the_figure_shows_every_finished_trial_the_front_and_the_default() -> None:
    (axis,) = front_figure(made(), OBJECTIVES).axes
    finished, front, default = [[tuple(place) for place in points.get_offsets()] for points in axis.collections]
    assert finished == [(9.0, 0.5), (5.0, 0.9), (6.0, 0.9), (1.0, 0.7)]
    assert front == [(5.0, 0.9), (1.0, 0.7)] and default == [(9.0, 0.5)]
    assert axis.get_xlabel() == "training operations (lower is better)"
    assert {text.get_text() for text in axis.texts} == {"t0001", "t0003"}


def test_of_one_objective_the_figure_shows_its_course_and_the_best_so_far() -> None:
    rows = [row(0, 0.5), row(1, 0.4), row(2, 0.9), row(3, None, state="PRUNED")]
    (axis,) = front_figure(rows, {"final_score": 1}).axes
    assert list(axis.lines[0].get_ydata()) == [0.5, 0.5, 0.9] and list(axis.lines[1].get_xdata()) == [3]


@pytest.mark.parametrize(
    ("values", "finished", "worse"),
    [
        ([0.4], [[0.5], [0.6], [0.7]], True),
        ([0.6], [[0.5], [0.6], [0.7]], False),  # the median itself goes on
        ([0.4], [[0.5], [0.6]], False),  # too few to compare with
        ([0.4, 9.0], [[0.5, 5.0], [0.6, 6.0], [0.7, 7.0]], True),  # behind in both
        ([0.4, 1.0], [[0.5, 5.0], [0.6, 6.0], [0.7, 7.0]], False),  # cheaper than most: may be on the front
        ([0.4, NAN], [[0.5, 5.0], [0.6, 6.0], [0.7, 7.0]], True),  # what is not known yet says nothing
        ([NAN, NAN], [[0.5, 5.0], [0.6, 6.0], [0.7, 7.0]], False),
    ],
)
def test_a_trial_is_pruned_where_it_is_behind_the_median_in_every_objective(values, finished, worse) -> None:
    assert worse_than_most(values, finished, [1, -1][: len(values)], least=3) is worse


class Seen:
    """What a sentence reads of a protocol."""

    tuned_on, on_test_sequence = "the first 2 of 4 tasks", False


def gain(metric: str, default: list[float], better: list[float]) -> Gain:
    pairs = dict(enumerate(b - a for a, b in zip(default, better, strict=True)))
    return Gain(metric=metric, default=interval(default), best=interval(better), by_seed=pairs,
                difference=interval(list(pairs.values())))  # fmt: skip


def test_a_gain_is_said_with_its_interval_and_its_price() -> None:
    scores = gain("final_score", [0.5, 0.6, 0.5, 0.6, 0.5], [0.7, 0.8, 0.7, 0.8, 0.75])
    price = gain("cost/training_flops", [1e9] * 5, [2e9] * 5)
    text = sentence([scores, price], row(3, 0.9), Seen())
    assert f"+0.210 ± {scores.difference.half:.3f} (0.540 → 0.750), a difference at 95 %" in text
    assert "2.00 times the training operations" in text


def test_a_loss_is_said_as_plainly_as_a_gain() -> None:
    text = sentence([gain("final_score", [0.7, 0.8], [0.5, 0.6])], row(3, 0.9), Seen())
    assert "final score −0.200" in text and "With these seeds the default settings scored higher" in text
    alone = sentence([gain("final_score", [0.7], [0.5])], row(3, 0.9), Seen())
    assert "1 fresh seed: final score −0.200 (0.700 → 0.500), no interval" in alone and "With this seed the" in alone
    unclear = sentence([gain("final_score", [0.7, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.2, 0.4, 0.5])], row(3, 0.9), Seen())
    assert "no difference shown" in unclear and "scored higher" not in unclear
    sure = sentence([gain("final_score", [0.7] * 5, [0.5, 0.5, 0.5, 0.5, 0.49])], row(3, 0.9), Seen())
    assert "The default settings score higher." in sure


def test_numbers_of_one_kind_are_written_alike_and_metrics_in_words() -> None:
    memory = gain("cost/buffer_bytes", [5280.0] * 2, [10560.0] * 2)
    flops = gain("cost/training_flops", [2.38e4, 2.38e4], [2.0e8, 2.0e8])
    assert words.shown(memory.metric, memory.default) == "5,280 ± 0"
    assert words.shown(memory.metric, memory.difference, sign=True) == "+5,280 ± 0"
    assert [words.shown(flops.metric, side) for side in (flops.default, flops.best)] == ["23,800 ± 0", "200 M ± 0"]
    assert [words.number("cost/steps", n) for n in (999.0, 1e4, 1.5e6, 2.38e10)] == [
        "999",
        "10,000",
        "1.50 M",
        "23.8 G",
    ]
    lost = gain("cumulative_forgetting", [0.5], [0.3])
    assert "Cumulative forgetting: −0.200 (0.500 → 0.300)" in sentence([lost, lost], row(3, 0.9), Seen())
    console = Console(width=80, file=io.StringIO())
    console.print(front_table(made()))
    assert "…" not in console.file.getvalue() and "training" in console.file.getvalue()
    assert all(words.named(name) != name for name in checks.OBJECTIVES)


def test_the_page_and_the_figures_are_there_and_the_page_needs_no_network() -> None:
    with formulas(lambda config, row: settings(config)[1] / 3, pages=True):
        tuned = tune(tune={"trials": 3, "objectives": ["final_score", "cost/training_flops"]})
    page = (tuned.folder / "tuning.html").read_text()
    assert not re.search(r'(src|href)="(https?:)?//', page) and "<svg" in page
    assert re.search(r'href="(report-t\d{4}/report.html)"', page)[1] == f"{tuned.report.folder.name}/report.html"
    assert (tuned.report.folder / "report.html").is_file()
    assert tuned.text.split(":")[0] in page and "best − default" in page
    names = {path.name for path in (tuned.folder / "figures").iterdir()}
    assert names == {"front.png", "front.svg", "gain.png", "gain.svg"} and tuned.gains
