"""MLflow's pages in a real browser: a study is found, compared and read, and its report needs no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import Browser
from mlflow_walk import opens_alone, walk
from records import remembered

from clplat.side_by_side import side_by_side
from clplat.side_page import write_side_page


@pytest.mark.long
def test_a_person_finds_a_study_compares_its_runs_and_reads_report_and_descriptions(tmp_path: Path) -> None:
    walk(tmp_path)


@pytest.mark.long
def test_a_comparison_of_streams_opens_without_a_network(tmp_path: Path) -> None:
    rows = {"naive": [0.2, 0.3], "er": [0.6, 0.7], "ewc": [0.25, 0.3]}
    runs = {
        v: {seed: [[0.1, 0.1], [0.9, 0.1], [end, end]] for seed, end in enumerate(ends)} for v, ends in rows.items()
    }
    side = side_by_side([remembered(f"stream-{n}", runs, baseline="naive") for n in range(5)])
    page = write_side_page(side, tmp_path)
    with Browser(tmp_path / "profile") as browser:
        browser.without_network()
        opens_alone(browser, page, "Best mean rank over 5 streams: er", "Paired differences", "Mean ranks")
