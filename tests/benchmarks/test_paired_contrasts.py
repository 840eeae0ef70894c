"""Contrasts pair arms by seed, count the seeds in which the first is better, and name an arm that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from records import cells
from studies import study

from clplat.journal import Journal
from clplat.study import lay_out
from clplat.study_file import expand, load_study, run_folders

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paired_contrasts.py"


def printed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_less_forgetting_and_higher_scores_count_as_better_in_seeds_that_both_have_finished() -> None:
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
    done = printed(str(folder), "mine:er")
    assert done.returncode == 0, done.stderr
    head, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    found = dict(zip(head[-5:], row[-5:]))
    assert row[0] == "mine − er"
    assert found["cumulative forgetting"] == "-0.125 ± 1.588, 1/2"
    assert found["final score"] == "0.062 ± 0.794, 1/2"
    assert found["learning score"] == "0.000 ± 0.000, 0/2"
    # On a straight line to the end of the stream, half of what is lost at its end; both windows begin at step 10.
    assert found["cumulative forgetting curve"] == found["cumulative forgetting curve first"] == "-0.062 ± 0.794, 1/2"
    wrong = printed(str(folder), "mine:err")
    assert wrong.returncode == 1 and "has no runs of 'err', did you mean 'er'" in wrong.stderr.replace(";", ",")
    assert printed(str(folder), "mine").returncode == 1
