"""`mlp_memory`'s benchmark runs without a GPU and sees what it compares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mlp_memory.py"


def test_a_toy_run_compares_forms_and_layers_and_says_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, str(SCRIPT), "--toy", "--milliseconds", "1", "--markdown", str(page)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    measured = {(row[1], row[2]): row for row in rows if row[0] == "2,40,2,16,16"}
    for which in ("forward", "forward + backward"):
        for form in ("mlp_memory", "eager chunk loop"):
            line = measured[which, form]
            assert float(line[3]) > 0 and float(line[8].split()[0]) < 1e-5
        assert (which, "titans-pytorch") in measured
    layers = {row[0]: row for row in rows if row[0].startswith(("TitansLMM", "GatedDeltaNet"))}
    assert len(layers) == 4 and float(layers["TitansLMM, chunk 16"][6]) > 0
