"""The benchmark of whole blocks runs without a GPU and measures every layer that it names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_blocks.py"


def test_a_toy_run_measures_every_layer_beside_gated_deltanet() -> None:
    sizes = ["--device", "cpu", "--tokens", "40", "--hidden", "32", "--heads", "2", "--rows", "1"]
    command = [sys.executable, str(SCRIPT), *sizes, "--milliseconds", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    lines = {line[0]: line for text in printed.splitlines()[2:] if (line := text.split(" | "))}
    assert len(lines) == 15 and lines["GatedDeltaNet, chunk 64"][-1] == "1.00"
    for name, line in lines.items():
        assert len(line) == 9 and float(line[3]) > 0 and float(line[-1]) > 0, name
