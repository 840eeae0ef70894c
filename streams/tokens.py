"""Token caches: documents tokenised once into flat files, mapped into memory, read as rows of T tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clplat.streams.batch import IGNORE, Batch
from clplat.streams.tokenizers import Tokenizer

FORMAT = 2
CHUNK = 512
"""Documents that are tokenised at once."""
FILES = ("tokens.bin", "ends.npy", "prompts.npy")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text; with a `prompt` in front, only the text is the answer."""

    text: str
    prompt: str = ""


def write_cache(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, *, max_tokens: int | None) -> None:
    """Tokenise documents into `folder`, whole or not at all; stops after the document that reaches `max_tokens`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        part = Path(temporary) / "cache"
        part.mkdir()
        head = _write_content(part, documents, tokenizer, max_tokens)
        head |= {"format": FORMAT, "tokenizer": tokenizer.identity, "sha256": {n: _sha256(part / n) for n in FILES}}
        sealed = {"head": head, "sha256": _seal(head)}
        (part / "head.json").write_text(json.dumps(sealed, indent=1))
        try:
            part.rename(folder)
        except OSError:
            # Another process finished the same cache first; ours is the same content.
            if not (folder / "head.json").is_file():
                raise


def _write_content(
    part: Path, documents: Iterable[Document], tokenizer: Tokenizer, max_tokens: int | None
) -> dict[str, Any]:
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    ends, prompts, size = [0], [], 0
    with (part / "tokens.bin").open("wb") as file:
        for document, prompt, text in _encoded(documents, tokenizer):
            file.write(np.asarray([*prompt, *text, tokenizer.end_token], dtype=kind).tobytes())
            ends.append(ends[-1] + len(prompt) + len(text) + 1)
            prompts.append(len(prompt))
            size += len(document.prompt.encode()) + len(document.text.encode())
            if max_tokens is not None and ends[-1] >= max_tokens:
                break
    np.save(part / "ends.npy", np.asarray(ends, dtype=np.int64))
    np.save(part / "prompts.npy", np.asarray(prompts, dtype=np.int32))
    return {"dtype": kind.name, "tokens": ends[-1], "documents": len(prompts), "bytes": size}


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int], list[int]]]:
    """Each document with the ids of its prompt and of its text."""
    rest = iter(documents)
    while chunk := list(islice(rest, CHUNK)):
        prompts = tokenizer.encode([document.prompt for document in chunk])
        texts = tokenizer.encode([document.text for document in chunk])
        yield from zip(chunk, prompts, texts, strict=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """An opened cache: token ids (N,) on disk, document ends (D + 1,) and prompt lengths (D,) in memory.

    Document d holds the tokens ends[d] … ends[d + 1] − 1: prompt, text, end token. `bytes` counts its texts' UTF-8.
    """

    def __init__(self, folder: Path) -> None:
        """Checks header, sizes and checksums; a damaged cache is a `ValueError` that names the folder."""
        self.folder = folder
        try:
            sealed: dict[str, Any] = json.loads((folder / "head.json").read_text())
            head = sealed["head"]
            changed = [name for name in FILES if _sha256(folder / name) != head["sha256"][name]]
            if _seal(head) != sealed["sha256"] or changed:
                raise ValueError(f"{', '.join(changed) or 'head.json'} was changed or cut short")
            self.ends: NDArray[np.int64] = np.load(folder / "ends.npy", allow_pickle=False)
            self.prompts: NDArray[np.int32] = np.load(folder / "prompts.npy", allow_pickle=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"token cache {folder} is damaged ({error}); delete the folder and run again") from error
        self.kind, self.bytes = np.dtype(head["dtype"]), int(head["bytes"])
        self.digest = hashlib.sha256(json.dumps(head["sha256"], sort_keys=True).encode()).hexdigest()[:16]
        self.tokens = self._mapped()

    def _mapped(self) -> NDArray[Any]:
        if self.ends[-1] == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.kind)
        return np.memmap(self.folder / "tokens.bin", dtype=self.kind, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.tokens = self._mapped()

    def document(self, number: int) -> tuple[list[int], list[int]]:
        """Prompt and answer ids of one document, without its end token."""
        start, end = int(self.ends[number]), int(self.ends[number + 1]) - 1
        middle = start + int(self.prompts[number])
        return self.tokens[start:middle].tolist(), self.tokens[middle:end].tolist()


class TokenData:
    """A cache as rows of T tokens, one after another without overlap; row r predicts tokens rT + 1 … rT + T.

    The first token of a document is never a target: it would have to be guessed from another document. With
    `answers`, `answer` marks targets behind the prompt of their document, its end token included (none where
    documents have no prompt), and with `answers_only` the rest is ignored. `max_rows` keeps that many rows, spread
    evenly over the whole. Works in loader processes: pickled, it carries the file's name, not the tokens.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        length: int,
        task: int,
        answers: bool = False,
        answers_only: bool = False,
        max_rows: int | None = None,
    ) -> None:
        self.cache, self.tokens_per_row, self.task = cache, length, task
        self.answers, self.answers_only = answers, answers_only
        self._whole = max(0, len(cache.tokens) - 1) // length
        self._rows = self._whole if max_rows is None else min(self._whole, max_rows)
        self.nbytes = self._rows * length * cache.kind.itemsize
        identity = f"{cache.digest} {length} {self._rows} {answers} {answers_only}"
        self.digest = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._rows

    def batch(self, rows: Tensor) -> Batch:
        """Rows (B,) as inputs and targets (B, T)."""
        starts = rows.numpy() * self._whole // max(1, self._rows) * self.tokens_per_row
        places = starts[:, None] + np.arange(self.tokens_per_row + 1)
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
            segment_ids=segments[:, :-1] - segments[:, :1],
            answer=answer,
        )
