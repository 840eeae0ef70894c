"""Writing token caches: several parts in one pass, and going on where a killed writer stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from caches import written

from clplat.streams import token_writer
from clplat.streams.token_writer import Target, write_caches
from clplat.streams.tokenizers import ByteTokenizer
from clplat.streams.tokens import FILES, Document, TokenCache

DOCUMENTS = [Document(prompt="q" * (n % 3), text=f"{n} " * (1 + n % 7)) for n in range(400)]
FORK = multiprocessing.get_context("fork")


def part_of(document: Document) -> str:
    return "test" if int(document.text.split()[0]) % 5 == 0 else "train"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_writer, "CHUNK", 50)
    monkeypatch.setattr(token_writer, "COMMIT_SECONDS", 0.0)


def both(folder: Path, documents: Iterator[Document], max_tokens: int | None = None) -> dict[str, TokenCache]:
    targets = {
        "train": Target(folder=folder / "train", max_tokens=max_tokens),
        "test": Target(folder=folder / "test"),
    }
    write_caches(folder / "building", targets, documents, part_of, ByteTokenizer())
    return {name: TokenCache(target.folder) for name, target in targets.items()}


def test_one_pass_writes_each_part_as_if_it_were_written_alone(tmp_path: Path) -> None:
    caches = both(tmp_path / "both", iter(DOCUMENTS), max_tokens=900)
    for name, limit in (("train", 900), ("test", None)):
        alone = written(tmp_path / name, [d for d in DOCUMENTS if part_of(d) == name], max_tokens=limit)
        assert alone.digest == caches[name].digest and alone.bytes == caches[name].bytes
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["test", "train"]


@pytest.mark.parametrize("killed_after", [1, 37, 200, 399])
def test_a_killed_writer_goes_on_where_it_stopped_and_the_caches_are_the_same(
    tmp_path: Path, killed_after: int
) -> None:
    def dying() -> Iterator[Document]:
        for number, document in enumerate(DOCUMENTS):
            if number == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    whole = both(tmp_path / "whole", iter(DOCUMENTS))
    child = FORK.Process(target=lambda: both(tmp_path / "cut", dying()))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    read = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in DOCUMENTS:
            read += 1
            yield document

    encoded: list[int] = []
    original = ByteTokenizer.encode_joined

    class Counting(ByteTokenizer):
        def encode_joined(self, texts):
            encoded.append(len(texts))
            return original(self, texts)

    targets = {name: Target(folder=tmp_path / "cut" / name) for name in ("train", "test")}
    write_caches(tmp_path / "cut" / "building", targets, counted(), part_of, Counting())
    for name, cache in whole.items():
        again = TokenCache(tmp_path / "cut" / name)
        assert again.digest == cache.digest and again.bytes == cache.bytes
    # Read in order to be counted off, but not tokenised again, but for what was not committed when it died.
    assert read == len(DOCUMENTS) and sum(encoded) <= 2 * (len(DOCUMENTS) - killed_after + 30)


def test_an_error_of_the_source_reaches_the_caller_and_loses_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from DOCUMENTS[:100]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        both(tmp_path, broken())
    assert (tmp_path / "building" / "progress.json").is_file()
    assert both(tmp_path, iter(DOCUMENTS))["train"].documents == 320


def test_a_building_site_that_was_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from DOCUMENTS[:100]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        both(tmp_path, broken())
    (tmp_path / "building" / "train" / FILES[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"building.train is damaged.*delete the folder"):
        both(tmp_path, iter(DOCUMENTS))


def test_two_writers_of_one_cache_wait_for_each_other(tmp_path: Path) -> None:
    children = [FORK.Process(target=lambda: both(tmp_path, iter(DOCUMENTS))) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert TokenCache(tmp_path / "train").documents == 320


def test_joined_ids_are_those_of_single_texts() -> None:
    texts = ["", "é", "abc", ""]
    ids, lengths, sizes = ByteTokenizer().encode_joined(texts)
    assert ids.tolist() == [*"é".encode(), *b"abc"]
    assert lengths.tolist() == sizes.tolist() == [0, 2, 3, 0]
    assert lengths.dtype == np.int64
