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
    yield page


def books(folder: Path) -> Iterator[str]:
    """Text files in pieces, cut between paragraphs."""
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            sys.exit(f"--books: {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it, as iconv does")
        piece = ""
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= 10 * ENTRIES:
                yield piece
                piece = ""
        yield piece


def chosen_documents(texts: Iterable[str], limit: int) -> list[str]:
    """Distinct documents, shuffled by their content, of at most `limit` characters together."""
    # Not the plain hash of the text, by which streams hold documents out: the two choices must be independent.
    found = {hashlib.sha256(b"shuffled" + text.encode()).hexdigest(): text for text in texts if len(text) in LENGTHS}
    kept, size = [], 0
    for _, text in sorted(found.items()):
        if size + len(text) > limit:
            break
        kept.append(text)
        size += len(text)
    return kept


def write(documents: Iterable[str], out: Path) -> None:
    """One document a line, as JSON."""
    with out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)


def check(chosen: argparse.Namespace, docs: Path | None) -> None:
    """Stop before anything is read where a source is not there or `--out` cannot be made."""
    for path, fix in (
        (chosen.python, "name a folder of .py files with --python"),
        (docs or Path("linux-doc"), "apt-get install linux-doc, or --docs"),
        (chosen.books or chosen.python, "--books names a folder of .txt files"),
    ):
        if not path.is_dir():
            sys.exit(f"{path} is not a folder that is there: {fix}")
    if not chosen.dictionary.is_file():
        sys.exit(f"{chosen.dictionary} is not there: apt-get install dict-gcide, or --dictionary")
    if chosen.books and not any(chosen.books.glob("*.txt")):
        sys.exit(f"--books: {chosen.books} holds no .txt file")
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out: {chosen.out} cannot be made ({error.strerror}); name a folder that can be written")


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
    check(chosen, docs)
    english = [*dictionary(chosen.dictionary), *(books(chosen.books) if chosen.books else ())]
    domains = {"python": python_sources(chosen.python), "kernel": documentation(docs), "english": english}
    for name, texts in domains.items():
        documents = chosen_documents(texts, chosen.characters)
        if not documents:
            sys.exit(f"{name}: no document of {LENGTHS.start} to {LENGTHS.stop - 1:,} characters, at most "
                     f"{chosen.characters:,} together; give it another folder or more --characters")  # fmt: skip
        write(documents, chosen.out / f"{name}.jsonl")
        size = sum(map(len, documents))
        print(f"{chosen.out / name}.jsonl: {len(documents):,} documents, {size:,} characters", flush=True)


if __name__ == "__main__":
    main()
