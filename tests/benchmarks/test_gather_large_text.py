"""Gathering text: nothing is lost, limits hold, and what is not there is said before anything is written."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gather_large_text.py"


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A little of everything, by option."""
    found = {name: tmp_path / name for name in ("python", "docs", "books")}
    for name, suffix in (("python", "py"), ("docs", "rst"), ("books", "txt")):
        found[name].mkdir()
        (found[name] / f"a.{suffix}").write_text(f"{name} " * 200)
    found["dictionary"] = tmp_path / "words.dict.dz"
    with gzip.open(found["dictionary"], "wt") as file:
        file.write("\n\n".join(f"Word{n}\n   Its meaning, number {n}." for n in range(300)))
    return found


def gather(sources: dict[str, Path], *more: str, out: str = "out") -> subprocess.CompletedProcess[str]:
    options = [word for name, path in sources.items() for word in (f"--{name}", str(path))]
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", out, *options, *more], capture_output=True, text=True, timeout=60
    )


def documents(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path("out", f"{name}.jsonl").read_text().splitlines()]


def test_short_books_and_the_last_pieces_of_books_and_dictionary_are_kept(sources: dict[str, Path]) -> None:
    (sources["books"] / "long.txt").write_text("\n\n".join(f"Paragraph {n}. " * 40 for n in range(101)))
    assert gather(sources).returncode == 0
    english = "".join(documents("english"))
    assert "books books" in english and "Paragraph 100." in english and "number 299." in english


def test_no_domain_has_more_characters_than_allowed(sources: dict[str, Path]) -> None:
    assert gather(sources, "--characters", "6000").returncode == 0
    assert all(0 < sum(map(len, documents(name))) <= 6000 for name in ("python", "kernel", "english"))


@pytest.mark.parametrize("option", ["python", "docs", "books", "dictionary"])
def test_a_source_that_is_not_there_is_named_before_anything_is_written(sources: dict[str, Path], option: str) -> None:
    done = gather(sources | {option: Path("nowhere")})
    assert done.returncode == 1 and "nowhere is not" in done.stderr and f"--{option}" in done.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda books: (books / "b.txt").write_bytes("café".encode("latin-1")),
            "b.txt is not UTF-8 (unexpected end of",
        ),
        (lambda books: (books / "a.txt").rename(books / "a.md"), "books holds no .txt file"),
    ],
)
def test_books_that_cannot_be_read_are_named_without_a_traceback(
    sources: dict[str, Path], damage: object, message: str
) -> None:
    damage(sources["books"])
    done = gather(sources)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_an_empty_domain_and_a_folder_that_cannot_be_made_are_errors(sources: dict[str, Path]) -> None:
    done = gather(sources, "--characters", "0")
    assert done.returncode == 1 and done.stderr.startswith("python: no document of 500 to 199,999 characters")
    Path("file").touch()
    done = gather(sources, out="file")
    assert done.returncode == 1 and "--out: file cannot be made" in done.stderr
