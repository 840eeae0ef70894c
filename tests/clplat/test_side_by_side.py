"""Several studies stream by stream: columns, paired differences, ranks, and what cannot be said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import Made, remembered

from clplat.cli import main
from clplat.errors import ConfigError
from clplat.metrics import interval
from clplat.side_by_side import SideBySide, difference_rows, score_rows, side_by_side, side_finding, side_notes
from clplat.side_page import write_side_page
from clplat.study_results import StudyResults


def known(finals: dict[str, float], name: str = "S0", *, baseline: str | None = "naive", seeds: int = 2,
          higher: bool = True, reference: str = "") -> StudyResults:  # fmt: skip
    """A study whose variants end with these final scores, a hundredth apart by seed."""
    runs = {v: {seed: [[0.1, 0.1], [0.9, 0.1], [final + seed / 100] * 2] for seed in range(seeds)}
            for v, final in finals.items()}  # fmt: skip
    return remembered(name, runs, baseline=baseline, higher=higher, tags={reference: {"reference": "true"}})


def of_streams(*rows: dict[str, float], **more: Any) -> SideBySide:
    return side_by_side([known(finals, f"S{n}", **more) for n, finals in enumerate(rows)])


def test_columns_are_streams_and_ranks_and_differences_are_those_of_the_scores() -> None:
    first, second = {"naive": 0.2, "er": 0.6, "ewc": 0.3}, {"naive": 0.5, "er": 0.4, "only_here": 0.9, "ewc": 0.5}
    side = of_streams(first, second)
    assert list(side.studies) == ["S0", "S1"] and side.baseline == "naive"
    assert side.by_seed("er", "S0") == pytest.approx({0: 0.4, 1: 0.4})
    # Equal scores share their ranks; who is not everywhere is not ranked.
    assert side.mean_ranks() == {"naive": 2.25, "er": 2.0, "ewc": 1.75}
    assert side.over_streams("er").mean == pytest.approx(interval([0.4, -0.1]).mean)
    assert side.over_streams("er").half == pytest.approx(interval([0.4, -0.1]).half)
    assert side.better_in("er") == (1, 2)
    assert str(side.over_streams("only_here")) == "0.400" and side.better_in("only_here") == (1, 1)
    assert side_notes(side) == [
        "not ranked, since not in every stream: S0 has none of only_here",
        "no critical difference: that needs at least 5 streams, and these are 2",
    ]
    assert side_finding(side).startswith("Best mean rank over 2 streams: ewc, 1.75 of 3 variants; its final score is")
    assert "with fewer than 5 streams a direction, not a finding" in side_finding(side)


def stopped(study: StudyResults, *gone: str) -> StudyResults:
    """The study with runs of some variants that were stopped before they had a score."""
    runs = [replace(run, status="KILLED", metrics={}, tags=run.tags | {"status_reason": "stopped by SIGTERM"})
            if run.variant in gone else run for run in study.runs]  # fmt: skip
    return replace(study, runs=runs)


def test_one_variant_that_all_studies_have_is_not_the_best_of_them_and_the_missing_are_named() -> None:
    finals = {"naive": 0.2, "er": 0.8, "slow": 0.7}
    whole = [known(finals, f"S{n}", seeds=1) for n in range(2)]
    side = side_by_side([*whole, stopped(known(finals, "C", seeds=1), "er", "slow")])
    assert side_finding(side) == (
        "No ranking over streams: that needs two variants, reference arms left out, with a final score in every study; "
        "C has none of er, slow."
    )
    assert difference_rows(side)[1][0] == ["er", "0.600", "0.600", "–", "0.600 ± 0.000", "2 of 2"]
    assert "C: er, seed 0: KILLED stopped by SIGTERM" in side_notes(side)


def test_studies_of_one_stream_are_no_streams_and_what_else_they_differ_in_is_said() -> None:
    studies = [known({"naive": 0.2, "er": 0.6}, "S0"), known({"naive": 0.2, "er": 0.7}, "S1")]
    runs = [replace(run, params={"stream.class_path": "S0", "training.batch_size": "64", "variant": run.variant},
                    data={}) for run in studies[1].runs]  # fmt: skip
    runs_of_first = [replace(run, params={"stream.class_path": "S0", "training.batch_size": "32"}, data={"a": "1"})
                     for run in studies[0].runs]  # fmt: skip
    first, second = replace(studies[0], runs=runs_of_first), replace(studies[1], runs=runs)
    side = side_by_side([first, second, known({"naive": 0.2, "er": 0.6}, "S2")])
    assert side.shared == [["S0", "S1"]] and not side.mean_ranks() and side.over_streams("er") is None
    assert "they differ in training.batch_size: 32, 64" in side_notes(side)[0]
    assert score_rows(side)[0] == ["variant", "S0", "S1", "S2"]
    # Parts of one study are apart in their seeds alone.
    part = replace(first, folder="S0b", runs=[replace(run, seed=run.seed + 1) for run in first.runs])
    assert "they differ in seeds: [0, 1] and [1, 2]" in side_notes(side_by_side([first, part]))[0]
    # Without a common variant: by what each study has in all of its own.
    renamed = replace(second, runs=[replace(run, variant=f"my-{run.variant}") for run in runs])
    alone = [replace(first, baseline=None), replace(renamed, baseline=None)]
    assert "they differ in training.batch_size: 32, 64" in side_notes(side_by_side(alone))[0]
    # The same options and other data, as of a folder whose files were changed, are another stream.
    other = replace(second, runs=[replace(run, data={"a": "2"}) for run in runs])
    assert not side_by_side([first, other]).shared


def test_from_five_streams_on_the_critical_difference_is_that_of_nemenyis_test() -> None:
    rows = [{"naive": 0.2, "er": 0.6 + n / 100, "ewc": 0.3, "joint": 0.9} for n in range(5)]
    side = of_streams(*rows, reference="joint", seeds=1)
    distance, p = side.critical_difference()
    # Demšar 2006, table 5: q = 2.343 for 3 classifiers; all streams agree, so Friedman's statistic is N (k − 1) = 10.
    assert distance == pytest.approx(2.343 * (3 * 4 / (6 * 5)) ** 0.5, abs=1e-3) and p == pytest.approx(
        0.0067, abs=1e-4
    )
    assert side.mean_ranks() == {"naive": 3.0, "er": 1.0, "ewc": 2.0}
    assert "it is better than naive." in side_finding(side) and not side_notes(side)
    page = write_side_page(side, Path("out"))
    assert {file.name for file in Path("out/figures").iterdir()} == {
        f"{name}.{kind}" for name in ("streams", "ranks") for kind in ("png", "svg")
    }
    assert page.read_text().count("<svg") == 2 and "joint †" in page.read_text()


def test_scores_of_different_units_are_ranked_and_never_averaged() -> None:
    accuracy = known({"naive": 0.2, "er": 0.6}, "images")
    losses = known({"naive": 3.0, "er": 2.0}, "text", higher=False)
    side = side_by_side([accuracy, losses])
    assert side.mean_ranks() == {"naive": 2.0, "er": 1.0} and side.over_streams("er") is None
    assert "no mean of differences over streams: they are scored by accuracy, loss" in side_notes(side)
    assert side_finding(side) == "Best mean rank over 2 streams: er, 1.00 of 2 variants."


def test_what_cannot_be_compared_is_said() -> None:
    first, second = known({"naive": 0.2, "er": 0.6}, "one"), known({"naive": 0.2}, "two", baseline=None)
    with pytest.raises(ConfigError, match="named twice"):
        side_by_side([first, first])
    with pytest.raises(ConfigError, match="has no variant 'naiv'; did you mean 'naive'"):
        side_by_side([first, second], "naiv")
    side = side_by_side([first, second])
    assert "no differences: the studies have no common baseline; name one with --baseline" in side_notes(side)
    assert list(side.studies) == ["one", "two"]
    write_side_page(side, Path("out"))
    assert not list(Path("out/figures").iterdir())


def test_compare_and_report_take_several_studies_and_name_those_of_one_stream_by_their_folders(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for final in (0.6, 0.7):
        study = Made(store, ["naive", "er"], [0], baseline="naive")
        study.run("naive", 0, [[0.1, 0.1], [0.9, 0.1], [0.2, 0.2]])
        study.run("er", 0, [[0.1, 0.1], [0.9, 0.1], [final, final]])
        folders.append(study.folder)
    for command in (["compare"], ["report", "--out", "both"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *map(str, folders)])
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "final score − naive" in said and "both/comparison.html" in said
    page = Path("both/comparison.html").read_text()
    assert all(f"<th>{folder.name}</th>" in page for folder in folders) and "Paired differences" in page
    # Two studies of one stream are no two streams.
    one, two = (folder.name for folder in folders)
    assert f"{one}, {two} are of one stream. Best final score in {one}: er, 0.600; in {two}: er, 0.700." in page
    assert "Mean rank" not in page and "<th>mean rank</th>" not in page and "better in" not in page
