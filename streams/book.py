"""Books that are read once, chunk after chunk: what reading has taught shows in the next chunk's loss."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from clplat.streams.base import EvalSet, Spec, Stream, Task
from clplat.streams.cache_folder import cache_folder, made
from clplat.streams.documents import Domain
from clplat.streams.multiple_choice import MultipleChoice
from clplat.streams.reading_rows import ReadingRows, check_reading, chunks_of
from clplat.streams.scorers import Likelihood
from clplat.streams.tokenizers import ByteTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Book:
    """A text file, or row `row` of a JSON-lines file with its text in `text_field` (PG-19's layout). Variables in
    `file` are expanded. The first `max_tokens` are read."""

    name: str
    file: str
    row: int = 0
    text_field: str = "text"
    max_tokens: int | None = None

    def domain(self) -> Domain:
        """How its text is found."""
        text = self.file.endswith(".txt")
        return Domain(
            name=self.name, path="text" if text else "json", data_files={"train": self.file},
            text_field=self.text_field, document="file" if text else "row",
        )  # fmt: skip

    def text(self) -> str:
        """The whole text; ValueError where the file has no such row."""
        found = next(islice(self.domain().documents("train"), self.row, None), None)
        if found is None:
            raise ValueError(f"book {self.name!r}: {self.file} has no row {self.row} with a text in "
                             f"{self.text_field!r}")  # fmt: skip
        return found.text


class BookStream(Stream):
    """One task for each part of each book. A task's training rows are its chunks in order, its test set the same
    chunks: what is scored before a part is read is what its reader knows from all before it.

    With `Prequential` every chunk is scored before it is learned. Rows of the result table tell the same by parts: row
    t, task t is the loss of part t before reading it, and forward transfer what reading the parts before has gained.
    """

    paper = "Rae et al. 2020, arXiv:1911.05507 (PG-19); Lu et al. 2026, arXiv:2602.05085"

    def __init__(
        self,
        *,
        books: list[Book],
        tokenizer: Tokenizer | None = None,
        chunk: int = 1024,
        window: int = 2048,
        passes: int = 2,
        parts: int = 4,
        max_eval_rows: int | None = None,
        multiple_choice: list[MultipleChoice] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """A row shows `window` tokens, of which the last `chunk` are learned, and stands `passes` times in a row: one
        epoch reads a book once. `parts` divide each book's chunks evenly, and at most `max_eval_rows` chunks of each
        are its test set. `tokenizer` defaults to bytes; `multiple_choice` questions are scored before, between and
        behind the parts."""
        check_reading(chunk=chunk, window=window, passes=passes)
        if not books or parts < 1 or (max_eval_rows is not None and max_eval_rows < 1):
            raise ValueError(f"books, parts, max_eval_rows: at least one of each, got {len(books)}, {parts} and "
                             f"{max_eval_rows}")  # fmt: skip
        names = [book.name for book in books] + [asked.name for asked in multiple_choice or []]
        if len(set(names)) < len(names):
            raise ValueError(f"books, multiple_choice: each needs a name of its own, got {names}")
        for book in books:
            if (
                not re.fullmatch(r"[\w.-]+", book.name)
                or book.row < 0
                or (book.max_tokens is not None and book.max_tokens < 2)
            ):
                raise ValueError(f"book {book.name!r}: its name is made of letters, digits, '.', '_' and '-', row is "
                                 "at least 0 and max_tokens at least 2")  # fmt: skip
            book.domain().check()
        for asked in multiple_choice or []:
            asked.check()
        self.books, self.chunk, self.window, self.passes, self.parts = books, chunk, window, passes, parts
        self.max_eval_rows = max_eval_rows
        self.tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.multiple_choice, self.cache_dir = multiple_choice or [], cache_folder(cache_dir)

    def prepare(self) -> None:
        texts = [book.text() for book in self.books]
        source = hashlib.sha256("".join(texts).encode()).hexdigest()
        self.tokenizer.prepare(iter(texts), made(self.cache_dir), source)
        self.spec = Spec(
            kind="language", input_shape=(self.window,), num_outputs=self.tokenizer.vocab_size,
            end_token=self.tokenizer.end_token,
        )  # fmt: skip
        self.tasks, self.lengths = [], {}
        for book, text in zip(self.books, texts, strict=True):
            begin = [] if self.tokenizer.begin_token is None else [self.tokenizer.begin_token]
            tokens = (begin + self.tokenizer.encode([text])[0])[: book.max_tokens]
            self.lengths[book.name] = len(tokens)
            self._add(book, torch.tensor(tokens, dtype=torch.int32))
        self.probes = [asked.eval_set(self.tokenizer, self.window) for asked in self.multiple_choice]

    def facts(self) -> Mapping[str, Any]:
        """Tokens of every book, and how it is read."""
        return {
            "vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.identity, "chunk": self.chunk,
            "window": self.window, "passes": self.passes,
            **{f"{name}.tokens": length for name, length in self.lengths.items()},
        }  # fmt: skip

    def _add(self, book: Book, tokens: Tensor) -> None:
        """The tasks of one book."""
        chunks = chunks_of(len(tokens), self.chunk)
        if chunks < self.parts:
            raise ValueError(f"book {book.name!r}: {len(tokens)} tokens are {chunks} chunks of {self.chunk}, and fewer "
                             f"than parts ({self.parts}); lower chunk or parts")  # fmt: skip
        scorer = Likelihood(token_bytes=self.tokenizer.token_bytes())
        for part in range(self.parts):
            name = book.name if self.parts == 1 else f"{book.name}_{part + 1}"
            index = len(self.tasks)

            def rows(passes: int, max_rows: int | None, part: int = part, index: int = index) -> ReadingRows:
                return ReadingRows(
                    tokens, chunk=self.chunk, window=self.window, end=self.tokenizer.end_token, task=index,
                    passes=passes, first=part * chunks // self.parts, last=(part + 1) * chunks // self.parts,
                    max_rows=max_rows,
                )  # fmt: skip

            test = EvalSet(name=name, data=rows(1, self.max_eval_rows), scorer=scorer)
            self.tasks = [*self.tasks, Task(index=index, name=name, train=rows(self.passes, None), test=test,
                                            headline="loss")]  # fmt: skip
