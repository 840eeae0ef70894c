"""`topk_memory`'s benchmark runs without a GPU and sees what it compares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "topk_memory.py"


def test_a_toy_run_compares_with_the_eager_form_and_finds_both_right(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, str(SCRIPT), "--toy", "--milliseconds", "1", "--markdown", str(page)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| 20,300")]
    assert [(line[1], line[2]) for line in lines] == [
        (which, form) for which in ("forward", "forward + backward") for form in ("topk_read", "eager")
    ]
    for line in lines:
        assert float(line[3]) > 0 and line[-2] == "100.00%" and float(line[-1]) < 1e-5
    assert "| 16,384, 8 | expert_order |" in page.read_text()
