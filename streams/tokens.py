"""Token caches: documents tokenised once into flat files, mapped into memory, read as rows of T tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clplat.streams.batch import IGNORE, Batch
from clplat.streams.tokenizers import Tokenizer

FORMAT = 1
CHUNK = 512
"""Documents that are tokenised at once."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text; with a `prompt` in front, only the text is the answer."""

    text: str
    prompt: str = ""


def write_cache(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, *, max_tokens: int | None) -> None:
    """Tokenise documents into `folder`, whole or not at all; stops after the document that passes `max_tokens`."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    ends, prompts, checksum, total = [0], [], hashlib.sha256(), 0
    with (part / "tokens.bin").open("wb") as file:
        for ids, prompt in _encoded(documents, tokenizer):
            content = np.asarray([*ids, tokenizer.end_token], dtype=kind).tobytes()
            file.write(content)
            checksum.update(content)
            total += len(ids) + 1
            ends.append(total)
            prompts.append(prompt)
            if max_tokens is not None and total >= max_tokens:
                break
    np.save(part / "ends.npy", np.asarray(ends, dtype=np.int64))
    np.save(part / "prompts.npy", np.asarray(prompts, dtype=np.int32))
    head = {"format": FORMAT, "dtype": kind.name, "tokens": total, "documents": len(prompts),
            "sha256": checksum.hexdigest(), "tokenizer": tokenizer.identity}  # fmt: skip
    (part / "head.json").write_text(json.dumps(head))
    try:
        part.rename(folder)
    except OSError:
        if not (folder / "head.json").is_file():
            raise
        # Another process finished the same cache first; ours is the same content.
        for file_path in part.iterdir():
            file_path.unlink()
        part.rmdir()


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Ids of each document with its prompt in front, and how many of them are prompt."""
    chunk: list[Document] = []

    def flush() -> Iterator[tuple[list[int], int]]:
        prompts = tokenizer.encode([one.prompt for one in chunk])
        texts = tokenizer.encode([one.text for one in chunk])
        yield from ((prompt + text, len(prompt)) for prompt, text in zip(prompts, texts, strict=True))

    for document in documents:
        chunk.append(document)
        if len(chunk) == CHUNK:
            yield from flush()
            chunk = []
    yield from flush()


class TokenCache:
    """An opened cache: token ids (N,) on disk, document ends and prompt lengths in memory."""

    def __init__(self, folder: Path) -> None:
        """Checks sizes and the checksum; a damaged cache is a `ValueError` that names the folder."""
        self.folder = folder
        try:
            head: dict[str, Any] = json.loads((folder / "head.json").read_text())
            self.ends: NDArray[np.int64] = np.load(folder / "ends.npy", allow_pickle=False)
            self.prompts: NDArray[np.int32] = np.load(folder / "prompts.npy", allow_pickle=False)
            self.kind = np.dtype(head["dtype"])
            self.tokens = np.memmap(folder / "tokens.bin", dtype=self.kind, mode="r")
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"token cache {folder} is damaged ({error}); delete the folder and run again") from error
        self.digest = head["sha256"][:16]
        sound = len(self.tokens) == head["tokens"] == self.ends[-1] and len(self.prompts) == len(self.ends) - 1
        if not sound or self._checksum() != head["sha256"]:
            raise ValueError(f"token cache {folder} is damaged (content does not match); delete the folder and run again")

    def _checksum(self) -> str:
        with (self.folder / "tokens.bin").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.tokens = np.memmap(self.folder / "tokens.bin", dtype=self.kind, mode="r")

    def document(self, number: int) -> tuple[list[int], list[int]]:
        """Prompt and answer ids of one document, without its end token."""
        start, end = int(self.ends[number]), int(self.ends[number + 1]) - 1
        middle = start + int(self.prompts[number])
        return self.tokens[start:middle].tolist(), self.tokens[middle:end].tolist()


class TokenData:
    """A cache as rows of T tokens, one after another without overlap; row r predicts tokens rT+1 … rT+T.

    The first token of a document is never a target: it would have to be guessed from another document. With
    `answers`, `answer` marks targets behind the prompt of their document (none where documents have no prompt), and
    with `answers_only` the rest is ignored.
    """

    def __init__(
        self, cache: TokenCache, *, length: int, task: int, answers: bool = False, answers_only: bool = False,
        max_rows: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.tokens_per_row, self.task = cache, length, task
        self.answers, self.answers_only = answers, answers_only
        rows = max(0, len(cache.tokens) - 1) // length
        self._rows = rows if max_rows is None else min(rows, max_rows)
        self.nbytes = self._rows * length * cache.kind.itemsize
        self.digest = hashlib.sha256(f"{cache.digest} {length} {self._rows} {answers_only}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._rows

    def batch(self, rows: Tensor) -> Batch:
        """Rows (B,) as inputs and targets (B, T)."""
        places = rows.numpy()[:, None] * self.tokens_per_row + np.arange(self.tokens_per_row + 1)
        window = torch.from_numpy(self.cache.tokens[places].astype(np.int64))
        documents = np.searchsorted(self.cache.ends, places, side="right") - 1
        segments = torch.from_numpy(documents)
        targets = window[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], IGNORE)
        answer = None
        if self.answers:
            inside, prompts = places[:, 1:] - self.cache.ends[documents[:, 1:]], self.cache.prompts[documents[:, 1:]]
            answer = torch.from_numpy((prompts > 0) & (inside >= prompts)) & (targets != IGNORE)
            if self.answers_only:
                targets = targets.masked_fill(~answer, IGNORE)
        return Batch(
            inputs=window[:, :-1].contiguous(),
            targets=targets,
            task=torch.full((len(rows),), self.task),
            segment_ids=(segments[:, :-1] - segments[:, :1]),
            answer=answer,
        )
