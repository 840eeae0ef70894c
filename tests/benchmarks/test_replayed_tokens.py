"""The table of what replayed tokens bought is that of the journals, through every view, of finished runs alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from records import cells
from studies import study

from clplat.journal import Journal
from clplat.study import lay_out
from clplat.study_file import expand, load_study, run_folders

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "replayed_tokens.py"


def printed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_forgetting_and_boundary_scores_are_those_of_each_view_and_differences_are_paired() -> None:
    config = load_study(study(variants={"er": {}, "mine": {}}, seeds=[0, 1], folder="runs"))
    folder = lay_out(config, expand(config))
    assert printed(str(folder)).returncode == 1
    for number, run in enumerate(run_folders(folder)):
        journal = Journal(run)
        better = 0.125 * (number > 1)
        for row, scores in enumerate([[0.5, 0.5], [1.0, 0.5], [0.5 + better, 0.75]]):
            shown = cells(scores, ["first", "second"])
            slow = [replace(cell, view="slow", headline=False, value=cell.value + 0.0625 * row) for cell in shown]
            journal.results(row, 10 * row, shown + slow)
            journal.metrics(10 * row, {"cost/replay_ratio": 0.25, "cost/buffer_bytes": 1000.0})
        journal.status("FINISHED" if number != 3 else "FAILED")
        journal.flush()
    done = printed(str(folder), "er")
    assert done.returncode == 0, done.stderr
    er = "0.500 ± 0.000 | 0.875 ± 0.000 | 0.625 ± 0.000 | 0.000 ± 0.000 | 0.000 ± 0.000"
    assert f"| er | default | 2 | {er} | 0.2500 | 1,000 |" in done.stdout
    assert "| mine | default | 1 | 0.375 | 0.875 | 0.688 | -0.125 | 0.000 | 0.2500 | 1,000 |" in done.stdout
    assert "| mine | slow | 1 | 0.312 | 0.969 | 0.812 | -0.188 | 0.094 | 0.2500 | 1,000 |" in done.stdout
