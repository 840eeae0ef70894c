"""Contrasts pair arms by seed, count the seeds in which the first is better, and name an arm that is not there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from records import cells
from studies import study

from clplat.journal import Journal
from clplat.study import lay_out
from clplat.study_file import expand, load_study, run_folders

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paired_contrasts.py"


def test_less_forgetting_and_higher_scores_count_as_better_in_seeds_that_both_have_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("paired_contrasts", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = load_study(study(variants={"er": {}, "mine": {}}, seeds=[0, 1, 2], folder="runs"))
    folder = lay_out(config, expand(config))
    for run in run_folders(folder):
        arm, _, seed = run.name.rpartition("-s")
        journal = Journal(run)
        kept = 0.5 + (0.25 if arm == "mine" and seed == "0" else 0.0)
        for row, scores in enumerate([[0.5, 0.5], [1.0, 0.5], [kept, 0.75]]):
            journal.results(row, 10 * row, cells(scores, ["first", "second"]))
        journal.status("FAILED" if run.name == "mine-s2" else "FINISHED")
        journal.flush()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), "mine:er"])
    script.main()
    head, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    found = dict(zip(head[-5:], row[-5:]))
    assert row[0] == "mine − er"
    assert found["cumulative forgetting"] == "-0.125 ± 1.588, 1/2"
    assert found["final score"] == "0.062 ± 0.794, 1/2"
    assert found["learning score"] == "0.000 ± 0.000, 0/2"
    # On a straight line to the end of the stream, half of what is lost at its end; both windows begin at step 10.
    assert found["cumulative forgetting curve"] == found["cumulative forgetting curve first"] == "-0.062 ± 0.794, 1/2"
    for pair, said in {"mine:err": "has no runs of 'err'.*did you mean 'er'", "mine": "a colon between"}.items():
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), pair])
        with pytest.raises(SystemExit, match=said):
            script.main()
