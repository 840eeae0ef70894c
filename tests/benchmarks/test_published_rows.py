"""Published rows: what is run in which order, what is left when time is over, and the table of what there is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from written_images import write_idx

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published_rows.py"
ROW = ("--rows", "split_mnist_class_none", "--steps", "2", "--seeds", "0", "1", "--out", "made")


def published(*options: str) -> subprocess.CompletedProcess[str]:
    write = Path("data/mnist")
    if not write.is_dir():
        write_idx(write, "MNIST")
    environment = os.environ | {"CLPLAT_DATA": "data"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_rows_are_run_side_by_side_continued_and_packed() -> None:
    none = published(*ROW, "--minutes", "0.001")
    assert none.returncode == 0 and "| van de Ven & Tolias, None, class | 0 | – | 19.9 |" in none.stdout
    done = published(*ROW, "--jobs", "2", "--minutes", "20")
    assert done.returncode == 0 and done.stdout.count("exit code 0") == 2, done.stdout + done.stderr
    with Path("made/rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["seed"]) for row in rows] == [("split_mnist_class_none", seed) for seed in "01"]
    mean = sum(float(row["final_score"]) for row in rows) / 2
    text = Path("made/rows.md").read_text()
    assert f"| 2 | {mean:.2f} ± " in text and f"| {mean - 19.9:+.2f} |" in text
    with tarfile.open("made.tgz") as packed:
        names = packed.getnames()
    assert "made/split_mnist_class_none/class_none-s1/journal.jsonl" in names
    assert not any("checkpoints" in name for name in names)
    again = published(*ROW, "--jobs", "2", "--minutes", "20")
    assert again.returncode == 0 and "exit code" not in again.stdout


def test_other_settings_do_not_mix_with_what_a_folder_holds() -> None:
    assert published(*ROW, "--minutes", "0.001").returncode == 0
    done = published(*ROW, "--steps", "3", "--minutes", "0.001")
    assert done.returncode == 1 and "this folder holds the row with other settings" in done.stderr


@pytest.mark.parametrize("pattern", ["split_mnist_gdum", "nothing*"])
def test_a_name_that_is_no_rows_is_refused(pattern: str) -> None:
    done = published("--rows", pattern)
    assert done.returncode == 2 and f"--rows: nothing is called '{pattern}'" in done.stderr


def test_numbers_that_were_read_come_before_those_that_were_recalled() -> None:
    lines = published("--plan").stdout.splitlines()
    places = {line.split()[0]: number for number, line in enumerate(lines)}
    assert places["split_mnist_gdumb"] < places["permuted_mnist20_er"]
    assert lines[-1].startswith(f"{len(lines) - 1} rows: ")
