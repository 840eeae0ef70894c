"""The kernels' benchmark: it runs without a GPU, and gives no ratio to what computes something else or nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Under a name of its own: other libraries look for a package called `kernels`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", FOLDER / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(script: ModuleType, **changes) -> object:
    options = {"toy": True, "cases": ["frozen"], "shapes": [(2, 70, 3, 16)], "milliseconds": 1.0, "backward": True}
    options |= {"peers": True, "compiled": False, "seconds": float("inf"), "markdown": None}
    return script.Benchmark(Namespace(**options | changes))


def test_a_toy_run_measures_every_case_and_writes_its_tables_between_the_pages_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = [f"<!-- written by benchmarks/kernels.py: {end} -->" for end in ("begin", "end")]
    page.write_text(f"# By hand\n\n{marks[0]}\nold\n{marks[1]}\n\nBelow.\n")
    command = [sys.executable, str(FOLDER / "kernels.py"), "--toy", "--shapes", "2,70,2,16", "--markdown", str(page)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    text = page.read_text()
    assert text.startswith("# By hand\n\n") and text.endswith(f"{marks[1]}\n\nBelow.\n") and "old" not in text
    rows = [
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith(("| gdn", "| hebb", "| frozen", "| exact"))
    ]
    own = [row for row in rows if len(row) == 11]
    assert len(own) == 10 and all(float(row[3]) > 0 and float(row[10].split()[0]) < 1e-5 for row in own)
    eager = [row for row in rows if row[3] == "eager chunk loop"]
    assert len(eager) == 10 and all(float(row[6].split()[0]) > 0 for row in eager)
    assert all(" | ".join(row).rstrip(" |") in printed for row in rows)


def test_a_peer_that_computes_something_else_gets_its_error_and_no_ratio(script: ModuleType) -> None:
    bench = toy(script)
    (case,) = bench.cases
    (good,) = script.loops(case, False)
    wrong = good._replace(prepare=lambda inputs: inputs._replace(v=1.05 * inputs.v))
    assert "differs" not in " ".join(bench.pair(good, case, True))
    *empty, error = bench.pair(wrong, case, True)
    assert empty == ["", "", "differs", ""] and 0.04 < float(error.split()[0]) < 0.06


def test_a_peer_that_cannot_be_had_leaves_the_exceptions_text_in_place_of_numbers(script: ModuleType) -> None:
    def missing():
        raise ImportError("no such | library")

    bench = toy(script)
    assert bench.beside([script.Peer("other", missing)], *bench.cases, False) == [
        ["other", "ImportError: no such / library"]
    ]


def test_nothing_starts_once_the_time_is_over_and_what_was_left_is_said(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = toy(script, seconds=-1.0, peers=False)
    bench.run()
    assert not bench.ours and "own: frozen, decay + momentum 2×70×3×16 with backward" in capsys.readouterr().out


def test_the_floor_is_traffic_for_a_linear_memory_and_products_for_wide_exact_heads(script: ModuleType) -> None:
    wide, tokens = (8, 4096, 16, 128), 8 * 4096 * 16
    traffic = tokens * (4 * 128 * 2 + 2 * 4) + 8 * 16 * 128 * 128 * 4
    assert script.floor_ms(script.Case("hebb", True, False, wide), False) == pytest.approx(1e3 * traffic / 3.0e12)
    products = 8 * 16 * 64 * (12 * 64 * 128**2 + 10 * 64**2 * 128 + 4 * 64**3)
    assert script.floor_ms(script.Case("exact", True, True, wide), False) == pytest.approx(1e3 * products / 790e12)
