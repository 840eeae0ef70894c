"""The tables of the timescales study are those of the journals, of finished runs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from records import cells
from studies import study

from clplat.journal import Journal
from clplat.study import lay_out
from clplat.study_file import expand, load_study, run_folders

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "timescales.py"


def printed(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=120)


def test_accuracies_steps_and_constants_are_means_over_finished_seeds() -> None:
    config = load_study(study(variants={"single": {}, "multi": {}}, seeds=[0, 1], folder="runs"))
    folder = lay_out(config, expand(config))
    assert printed(folder).returncode == 1
    for number, run in enumerate(run_folders(folder)):
        journal = Journal(run)
        for row, (step, scores) in enumerate([(0, [0.5, 0.5]), (50, [1.0, 0.4]), (150 + 50 * number, [0.6, 0.9])]):
            journal.metrics(step, {"model/tau_mean": 1.5 - 0.1 * row})
            journal.results(row, step, cells([score + 0.02 * number for score in scores], ["p2", "p3"]))
        journal.status("FINISHED" if number < 3 else "FAILED")
        journal.flush()
    done = printed(folder)
    assert done.returncode == 0, done.stderr
    assert "| single | 2 | 61.0 | 91.0 | 62.0 | 60.0 |" in done.stdout
    assert "| multi | 1 | 64.0 | 94.0 | 64.0 | 64.0 |" in done.stdout
    assert "| single | 50 | 125 | 175 ± 318 |" in done.stdout
    assert "| multi | 50 | 200 | 250 |" in done.stdout
    assert "| multi | 1.50 | 1.40 | 1.30 |" in done.stdout
