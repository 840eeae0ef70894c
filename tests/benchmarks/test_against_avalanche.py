"""The comparison with Avalanche's own loop, at its smallest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "against_avalanche.py"


def run(*words: str) -> list[list[str]]:
    """The lines that the script prints, in cells."""
    command = [sys.executable, str(SCRIPT), *words]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    return [line.split(" | ") for line in printed.splitlines()[1:]]


@pytest.mark.long
def test_with_equal_weights_and_rows_fifty_steps_have_avalanches_losses() -> None:
    names = ["naive", "ewc", "si", "lwf", "replay", "agem", "gdumb"]
    lines = run("losses")
    assert [line[:2] for line in lines] == [[name, "50"] for name in names]
    assert all(float(line[2]) < 1e-5 for line in lines)
    # In the second task each strategy changes the loss, or the weights that it is measured at.
    assert len({line[3].split(", ")[-1] for line in lines}) == len(names)


def test_the_interval_of_a_mean_is_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("against_avalanche", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["against_avalanche"] = module
    spec.loader.exec_module(module)
    # Standard deviation 1, n = 3: 4.3027 / √3.
    assert module.half_interval([1.0, 2.0, 3.0]) == pytest.approx(2.4841, abs=1e-4)
