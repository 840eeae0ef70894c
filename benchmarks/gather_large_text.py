"""Gather three clearly different text domains from what a developer's machine holds anyway.

    sudo apt-get install linux-doc dict-gcide        # documentation and a dictionary, by name
    python benchmarks/gather_large_text.py --out large_text [--books FOLDER]

writes `python.jsonl` (sources of installed packages), `kernel.jsonl` (the Linux kernel's documentation) and
`english.jsonl` (Webster's dictionary of 1913 in its GNU edition, and books), one document a line, in an order that
follows from the documents alone. `configs/large_text.yaml` trains on them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

LENGTHS = range(500, 200_000)
"""Characters that a document may have: stubs say nothing, and tables of numbers are longer."""
ENTRIES = 4_000
"""Characters of dictionary that make a document: single entries are too short for one."""


def python_sources(folder: Path) -> Iterator[str]:
    """Sources of the packages installed for this Python."""
    for path in sorted(folder.rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def documentation(folder: Path) -> Iterator[str]:
    """Pages of documentation as they were written, packed or not."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and re.search(r"\.(rst|txt)(\.gz)?$", path.name):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield content.decode("utf-8", errors="ignore")


def dictionary(path: Path) -> Iterator[str]:
    """A dictd file, many neighbouring entries a document."""
    page = ""
    for entry in re.split(r"\n\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")):
        page += entry + "\n\n"
        if len(page) >= ENTRIES:
            yield page
            page = ""


def books(folder: Path) -> Iterator[str]:
    """Text files in pieces, cut between paragraphs."""
    for path in sorted(folder.glob("*.txt")):
        piece = ""
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= 10 * ENTRIES:
                yield piece
                piece = ""


def gather(texts: Iterable[str], out: Path, limit: int) -> None:
    """Write distinct documents, shuffled by their content, up to `limit` characters."""
    # Not the plain hash of the text, by which streams hold documents out: the two choices must be independent.
    found = {hashlib.sha256(b"shuffled" + text.encode()).hexdigest(): text for text in texts if len(text) in LENGTHS}
    size = count = 0
    with out.open("w", encoding="utf-8") as file:
        for _, text in sorted(found.items()):
            if size > limit:
                break
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size, count = size + len(text), count + 1
    print(f"{out}: {count:,} documents, {size:,} characters")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--python", type=Path, default=Path(sysconfig.get_paths()["purelib"]))
    options.add_argument("--docs", type=Path, help="folder of .rst and .txt files (default: Debian's linux-doc)")
    options.add_argument("--dictionary", type=Path, default=Path("/usr/share/dictd/gcide.dict.dz"))
    options.add_argument("--books", type=Path, help="folder of .txt files, for the English domain too")
    options.add_argument("--characters", type=int, default=36_000_000, help="at most so many a domain")
    chosen = options.parse_args()
    docs = chosen.docs or next(iter(sorted(Path("/usr/share/doc").glob("linux-doc*/Documentation"))), None)
    for path, fix in (
        (docs, "apt-get install linux-doc, or --docs"),
        (chosen.dictionary, "apt-get install dict-gcide"),
    ):
        if path is None or not path.exists():
            sys.exit(f"{path or 'linux-doc'} is not there: {fix}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    english = [*dictionary(chosen.dictionary), *(books(chosen.books) if chosen.books else ())]
    gather(python_sources(chosen.python), chosen.out / "python.jsonl", chosen.characters)
    gather(documentation(docs), chosen.out / "kernel.jsonl", chosen.characters)
    gather(english, chosen.out / "english.jsonl", chosen.characters)


if __name__ == "__main__":
    main()
