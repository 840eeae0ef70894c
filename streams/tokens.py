"""Token caches: documents tokenised once into flat files, mapped into memory, read as rows of T tokens."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clplat.streams.batch import IGNORE, Batch

RESIDENT_BYTES = 2**31
"""Caches up to this size live on a GPU whole while their task is trained."""
FORMAT = 3
FILES = ("tokens.bin", "ends.bin", "prompts.bin")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text; with a `prompt` in front, only the text is the answer."""

    text: str
    prompt: str = ""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(head: dict[str, Any]) -> str:
    """Hex digest of a cache's header."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """An opened cache: token ids (N,), document ends (D,) and prompt lengths (D,), all left on disk.

    Document d holds the tokens ends[d − 1] … ends[d] − 1 (the first from 0): prompt, text, end token. `bytes` counts
    the UTF-8 of its texts.
    """

    def __init__(self, folder: Path) -> None:
        """Checks header, sizes and checksums; a damaged cache is a `ValueError` that names the folder."""
        self.folder = folder
        try:
            sealed: dict[str, Any] = json.loads((folder / "head.json").read_text())
            head = sealed["head"]
            changed = [name for name in FILES if sha256(folder / name) != head["sha256"][name]]
            if seal(head) != sealed["sha256"] or changed:
                raise ValueError(f"{', '.join(changed) or 'head.json'} was changed or cut short")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"token cache {folder} is damaged ({error}); delete the folder and run again") from error
        self.kind, self.bytes, self.documents = np.dtype(head["dtype"]), int(head["bytes"]), int(head["documents"])
        self.digest = hashlib.sha256(json.dumps(head["sha256"], sort_keys=True).encode()).hexdigest()[:16]
        self._map()

    def _map(self) -> None:
        """Open the files as arrays: what is not read takes no memory, and what is read is shared by all processes."""
        kinds = (self.kind, np.dtype(np.int64), np.dtype(np.int32))
        self.tokens, self.ends, self.prompts = (
            _mapped(self.folder / name, kind) for name, kind in zip(FILES, kinds, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("tokens", "ends", "prompts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map()

    def document(self, number: int) -> tuple[list[int], list[int]]:
        """Prompt and answer ids of one document, without its end token."""
        start, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number]) - 1
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
        self._open(torch.device("cpu"))

    def _open(self, device: torch.device) -> None:
        """The cache's arrays as tensors: on the CPU still the mapped files, elsewhere copies."""
        # torch indexes no unsigned kinds: their bits are read as signed ones, and `batch` masks the sign off.
        signed, self._mask = (np.int16, 0xFFFF) if self.cache.kind.itemsize == 2 else (np.int32, 0xFFFFFFFF)
        arrays = (self.cache.tokens.view(signed), self.cache.ends, self.cache.prompts)
        self._tokens, self._ends, self._prompts = (torch.from_numpy(array).to(device) for array in arrays)
        self._window = torch.arange(self.tokens_per_row + 1, device=device)

    def to(self, device: torch.device) -> TokenData:
        """With the whole cache on a GPU, unless it is larger than `RESIDENT_BYTES`; elsewhere the files serve."""
        if device.type == "cpu" or self.cache.tokens.nbytes + self.cache.ends.nbytes > RESIDENT_BYTES:
            return self
        moved = copy.copy(self)
        moved._open(device)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, Tensor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open(torch.device("cpu"))

    def __len__(self) -> int:
        return self._rows

    def batch(self, rows: Tensor) -> Batch:
        """Rows (B,) as inputs and targets (B, T)."""
        first = rows * self._whole // max(1, self._rows) * self.tokens_per_row
        places = first.to(self._window.device, non_blocking=True).unsqueeze(1) + self._window
        window = self._tokens[places].long() & self._mask
        documents = torch.searchsorted(self._ends, places, right=True)
        targets = window[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
        answer = self._behind_prompts(places[:, 1:], documents[:, 1:]) & (targets != IGNORE) if self.answers else None
        if answer is not None and self.answers_only:
            targets = targets.masked_fill(~answer, IGNORE)
        return Batch(
            inputs=window[:, :-1].contiguous(),
            targets=targets,
            task=torch.full((len(rows),), self.task, device=places.device),
            segment_ids=documents[:, :-1] - documents[:, :1],
            answer=answer,
        )

    def _behind_prompts(self, places: Tensor, documents: Tensor) -> Tensor:
        begun = torch.where(documents > 0, self._ends[(documents - 1).clamp(min=0)], 0)
        prompts = self._prompts[documents]
        return (prompts > 0) & (places - begun >= prompts)


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be mapped.
    # Mode "c" (a private copy of what is changed, and nothing is) because torch warns of arrays that cannot be.
    return np.memmap(path, dtype=kind, mode="c") if path.stat().st_size else np.zeros(0, dtype=kind)
