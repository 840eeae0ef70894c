"""From documents to token caches: read ahead, tokenised on all cores, several parts in one pass, resumable.

A thread reads the next chunk while this one is tokenised (fast tokenizers use every core and leave Python's lock).
What has been written is committed every few seconds in `progress.json` of the folder under construction; a killed
writer goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clplat.streams.documents import Part
from clplat.streams.tokenizers import Tokenizer
from clplat.streams.tokens import FILES, FORMAT, Document, seal, sha256

CHUNK = 4_000_000
"""Characters that are tokenised at once."""
COMMIT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A cache to be written: its folder, and the tokens after which it is full (with the document that reaches it)."""

    folder: Path
    max_tokens: int | None = None


def write_caches(
    building: Path,
    targets: Mapping[Part, Target],
    documents: Iterable[Document],
    part_of: Callable[[Document], Part],
    tokenizer: Tokenizer,
) -> None:
    """Tokenise `documents` into one cache for each part in `targets`, by what `part_of` says of each document.

    `building` is the folder under construction; `documents` must come in the same order each time, since a second
    attempt leaves out as many as the first one had finished. One process writes, others wait for it.
    """
    with _alone(building):
        if not all((target.folder / "head.json").is_file() for target in targets.values()):
            parts = {part: _Part(building / part, target, tokenizer) for part, target in targets.items()}
            try:
                _append_all(building, parts, documents, part_of)
                for part in parts.values():
                    part.finish()
            finally:
                for part in parts.values():
                    part.close()
        shutil.rmtree(building)


def _append_all(
    building: Path, parts: Mapping[Part, _Part], documents: Iterable[Document], part_of: Callable[[Document], Part]
) -> None:
    """Append the documents from where an earlier attempt stopped, until all parts are full or there are no more."""
    done, committed = _read_progress(building, parts), time.monotonic()
    for chunk in _chunks_ahead(islice(documents, done, None)):
        done += len(chunk)
        places = [part_of(document) for document in chunk]
        for name, part in parts.items():
            part.append([document for document, place in zip(chunk, places, strict=True) if place == name])
        if time.monotonic() - committed > COMMIT_SECONDS:
            _commit(building, parts, done)
            committed = time.monotonic()
        if all(part.full for part in parts.values()):
            return


@contextmanager
def _alone(building: Path) -> Iterator[None]:
    """Wait until no other process writes here; the kernel frees the lock of a process that dies."""
    building.mkdir(parents=True, exist_ok=True)
    with (building / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        building.mkdir(exist_ok=True)  # gone if the one before us has finished
        yield


def _chunks_ahead(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Chunks of documents, each read while the one before is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(_take, documents)
        while chunk := coming.result():
            coming = reader.submit(_take, documents)
            yield chunk


def _take(documents: Iterator[Document]) -> list[Document]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.prompt) + len(document.text)
        if size >= CHUNK:
            break
    return chunk


@dataclass(kw_only=True)
class _Count:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class _Part:
    """One cache under construction."""

    def __init__(self, folder: Path, target: Target, tokenizer: Tokenizer) -> None:
        self.folder, self.target, self.tokenizer = folder, target, tokenizer
        self.kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.count = _Count()
        folder.mkdir(exist_ok=True)
        self.files: dict[str, Any] = {name: (folder / name).open("ab") for name in FILES}

    @property
    def full(self) -> bool:
        return self.target.max_tokens is not None and self.count.tokens >= self.target.max_tokens

    def rewind(self, count: _Count) -> None:
        """Cut the files to what was committed."""
        self.count = count
        sizes = (count.tokens * self.kind.itemsize, count.documents * 8, count.documents * 4)
        for name, size in zip(FILES, sizes, strict=True):
            if os.path.getsize(self.folder / name) < size:
                raise ValueError(f"token cache {self.folder} is damaged (cut short); delete the folder and run again")
            self.files[name].truncate(size)

    def append(self, documents: list[Document]) -> None:
        """Tokens of all documents, each closed by the end token; only up to the one that fills the cache."""
        if not documents or self.full:
            return
        pieces = [piece for document in documents for piece in (document.prompt, document.text)]
        ids, lengths, sizes = self.tokenizer.encode_joined(pieces)
        ends = (lengths[0::2] + lengths[1::2] + 1).cumsum()
        tokens = np.insert(ids.astype(self.kind), ends - np.arange(1, len(ends) + 1), self.tokenizer.end_token)
        kept = len(ends)
        if self.target.max_tokens is not None:
            kept = min(kept, int(np.searchsorted(ends, self.target.max_tokens - self.count.tokens)) + 1)
        prompts = lengths[0::2].astype(np.int32)
        for name, values in zip(FILES, (tokens[: ends[kept - 1]], ends + self.count.tokens, prompts), strict=True):
            (values if name == FILES[0] else values[:kept]).tofile(self.files[name])
        self.count.documents += kept
        self.count.tokens += int(ends[kept - 1])
        self.count.bytes += int(sizes[: 2 * kept].sum())

    def sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def finish(self) -> None:
        """Seal the cache and move it to its place."""
        self.sync()
        head = asdict(self.count) | {
            "dtype": self.kind.name, "format": FORMAT, "tokenizer": self.tokenizer.identity,
            "sha256": {name: sha256(self.folder / name) for name in FILES},
        }  # fmt: skip
        (self.folder / "head.json").write_text(json.dumps({"head": head, "sha256": seal(head)}, indent=1))
        if not self.target.folder.is_dir():
            self.folder.rename(self.target.folder)


def _commit(building: Path, parts: Mapping[Part, _Part], documents: int) -> None:
    for part in parts.values():
        part.sync()
    progress = {"documents": documents, "parts": {name: asdict(part.count) for name, part in parts.items()}}
    (building / "progress.part").write_text(json.dumps(progress))
    (building / "progress.part").replace(building / "progress.json")


def _read_progress(building: Path, parts: Mapping[Part, _Part]) -> int:
    """Documents that an earlier attempt finished; its parts are cut to that place."""
    file = building / "progress.json"
    progress: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"documents": 0, "parts": {}}
    for name, part in parts.items():
        part.rewind(_Count(**progress["parts"].get(name, {})))
    return int(progress["documents"])


def building_folder(cache_dir: Path, name: str, targets: Mapping[Part, Target]) -> Path:
    """Where these caches are built: a name that other targets do not have."""
    key = hashlib.sha256(" ".join(target.folder.name for target in targets.values()).encode()).hexdigest()[:16]
    return cache_dir / f"{name}-{key}.building"
