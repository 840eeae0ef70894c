"""Which figures a report has: drawn where they have something to say, and saying what the numbers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from records import remembered

from clplat.page import write_report
from clplat.page_figures import _ablated, costs_of, on_front

NAIVE = {0: [[0.1, 0.1], [0.9, 0.1], [0.3, 0.8]], 1: [[0.1, 0.1], [0.8, 0.1], [0.4, 0.9]]}
ER = {0: [[0.1, 0.1], [0.9, 0.1], [0.8, 0.7]], 1: [[0.1, 0.1], [0.8, 0.1], [0.6, 0.8]]}
CUMULATIVE = {0: [[0.1, 0.1], [0.95, 0.1], [0.9, 0.9]], 1: [[0.1, 0.1], [0.8, 0.1], [0.8, 0.95]]}


def test_a_figure_is_drawn_where_it_has_something_to_say(tmp_path: Path) -> None:
    def drawn(*variants: str, seeds: tuple[int, ...]) -> set[str]:
        runs = {v: {seed: ER[seed] if v == "er" else NAIVE[seed] for seed in seeds} for v in variants}
        costs = {v: {"cost/training_flops": 200.0 if v == "er" else 100.0} for v in variants}
        page = write_report(remembered("digits", runs, baseline="naive", costs=costs), tmp_path / "out")
        assert page.read_text().count("<svg") == len(list((tmp_path / "out" / "figures").glob("*.svg")))
        return {file.stem for file in (tmp_path / "out" / "figures").iterdir()} - {"heat_maps", "final_scores"}

    plane = {"learned_and_lost", "forgetting"}
    assert drawn("naive", "er", "der", seeds=(0, 1)) == plane | {"paired", "ablation", "cost"}
    # What an earlier report has left is gone. One difference makes no ablation, one seed no interval, one arm no front.
    assert drawn("naive", "er", seeds=(0, 1)) == plane | {"paired", "cost"}
    assert drawn("naive", "er", seeds=(0,)) == plane | {"cost"}
    assert drawn("naive", "der", seeds=(0,)) == plane


def test_the_parts_of_a_difference_add_up_to_it_and_the_front_leaves_reference_arms_out() -> None:
    runs = {"naive": NAIVE, "er": ER, "cumulative": CUMULATIVE}
    costs, tags = {"cumulative": {"cost/steps": 99.0}}, {"cumulative": {"reference": "true"}}
    results = remembered("digits", runs, baseline="naive", costs=costs, tags=tags)
    part = _ablated(results, "er", "naive")
    assert part.learned + part.kept == pytest.approx(part.total.mean) == pytest.approx(0.125)
    costs = costs_of(results, results.variants())
    assert costs.keys() == {"optimizer steps"}
    scores = {variant: results.interval(variant, "final_score") for variant in results.variants()}
    assert on_front(scores, costs["optimizer steps"], ["naive", "er"]) == ["er"]
    page = write_report(results, "out").read_text()
    assert "by optimizer steps: er." in page and "Hollow: reference arms" in page
    assert re.search(r'<svg role="img" aria-label="Score and cost\. [^"]+"', page)
