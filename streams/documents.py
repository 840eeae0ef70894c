"""Where documents come from: hub data sets and local files, their own splits, or splits by document hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clplat.streams.base import Budget
from clplat.streams.tokens import Document

Part = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Which documents are kept from training where a set has no validation or test split of its own.

    A document's place follows from the hash of its text alone, so it is the same in any order and for any seed:
    a share `fraction` is for testing and another as large for validation.
    """

    by: Literal["document_hash"] = "document_hash"
    fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 0.5:
            raise ValueError(f"holdout.fraction: must lie between 0 and 0.5, got {self.fraction}")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One source of text, which becomes one task.

    `path` is a hub id, or "json", "text" or "parquet" with local `data_files` by split (`${VARIABLES}` are
    expanded). `splits` names the set's own splits for train, val and test; what is missing is held out from train.
    Text is in `text_field`, or in `prompt_field` and `answer_field` with `prompt_template` around the prompt.
    `document: heading` joins the lines of WikiText-like files into articles, which begin at ` = Title = `.
    `max_documents` bounds what is read of each split, `max_train_tokens` what is trained on. `exact_match` makes the
    model answer test prompts and compares what follows `answer_marker`.
    """

    name: str
    path: str
    config: str | None = None
    data_files: dict[str, str | list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    text_field: str = "text"
    prompt_field: str | None = None
    answer_field: str = "answer"
    prompt_template: str = "{prompt}\n"
    document: Literal["row", "heading"] = "row"
    holdout: Holdout = field(default_factory=Holdout)
    max_documents: int | None = None
    max_train_tokens: int | None = None
    budget: Budget | None = None
    exact_match: bool = False
    answer_marker: str = "####"
    answers_only: bool = False

    def own_splits(self) -> dict[str, str]:
        """The set's splits by part: as given, or those that `data_files` name, or train alone."""
        if self.splits:
            return self.splits
        return {part: part for part in self.data_files} or {"train": "train"}

    def files(self) -> dict[str, list[str]]:
        """Local files by split, with variables expanded; missing ones are named."""
        found: dict[str, list[str]] = {}
        for split, given in self.data_files.items():
            paths = [os.path.expandvars(path) for path in ([given] if isinstance(given, str) else given)]
            for path in paths:
                unset = re.search(r"\$\{?(\w+)", path)
                if unset:
                    raise ValueError(f"domain {self.name!r}, data_files.{split}: set the variable {unset[1]} ({path})")
                if "://" not in path and not any(c in path for c in "*?[") and not Path(path).is_file():
                    raise FileNotFoundError(f"domain {self.name!r}, data_files.{split}: there is no file {path}")
            found[split] = paths
        return found

    def check(self) -> None:
        """Everything that can be known without reading: files, parts, and options that need each other."""
        self.files()
        unknown = self.own_splits().keys() - {"train", "val", "test"}
        if unknown:
            raise ValueError(f"domain {self.name!r}: splits and data_files go by train, val and test, not {sorted(unknown)}")
        if self.path in ("json", "text", "parquet") and not self.data_files:
            raise ValueError(f"domain {self.name!r}: path {self.path!r} needs data_files")
        if (self.exact_match or self.answers_only) and self.prompt_field is None:
            raise ValueError(f"domain {self.name!r}: exact_match and answers_only need prompt_field")

    def source(self) -> str:
        """Identity of the documents (hex): contents of local files, names on the hub, and how they are read."""
        skipped = ("budget", "max_train_tokens", "exact_match", "answer_marker", "answers_only", "data_files", "name")
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in skipped}
        hashes = {split: [_content(path) for path in paths] for split, paths in self.files().items()}
        text = json.dumps([options, hashes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def documents(self, part: Part) -> Iterator[Document]:
        """The documents of one part, in the source's order."""
        own = self.own_splits()
        if part in own:
            split = own[part]
        elif "train" in own:
            split = own["train"]
        else:
            return
        if part in own and part != "train":
            yield from self._read(split)
        else:
            yield from self.held_out(self._read(split), part)

    def held_out(self, documents: Iterator[Document], part: Part) -> Iterator[Document]:
        """Those of the training documents that belong to `part`."""
        own = self.own_splits()
        return (document for document in documents if self._place(document, own) == part)

    def _place(self, document: Document, own: dict[str, str]) -> Part:
        """Where a training document belongs, by the hash of its text."""
        digest = hashlib.sha256((document.prompt + document.text).encode()).digest()
        share = int.from_bytes(digest[:8]) / 2**64
        if "test" not in own and share < self.holdout.fraction:
            return "test"
        if "val" not in own and self.holdout.fraction <= share < 2 * self.holdout.fraction:
            return "val"
        return "train"

    def _read(self, split: str) -> Iterator[Document]:
        """Documents of one split, streamed: nothing is copied to disk, and a huge set ends at `max_documents`."""
        from datasets import load_dataset

        files = self.files()
        rows: Any = load_dataset(
            self.path, self.config, data_files={split: files[split]} if files else None, split=split, streaming=True
        )
        texts = _articles(row[self.text_field] for row in rows) if self.document == "heading" else None
        found = (Document(text=text) for text in texts) if texts is not None else map(self._from_row, rows)
        for number, document in enumerate(found):
            if number == self.max_documents:
                return
            if document.text.strip():
                yield document

    def _from_row(self, row: dict[str, Any]) -> Document:
        wanted = [self.text_field] if self.prompt_field is None else [self.prompt_field, self.answer_field]
        missing = [name for name in wanted if name not in row]
        if missing:
            raise ValueError(f"domain {self.name!r}: rows have no field {missing[0]!r}; they have {sorted(row)}")
        if self.prompt_field is None:
            return Document(text=row[self.text_field])
        return Document(
            text=row[self.answer_field], prompt=self.prompt_template.format(prompt=row[self.prompt_field])
        )


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined into articles; one begins at a top heading ` = Title = `, not at ` = = Section = = `."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r"\s*= [^=].*[^=] =\s*", line) and article:
            yield "\n".join(article)
            article = []
        article.append(line)
    if article:
        yield "\n".join(article)


def _content(path: str) -> str:
    if not Path(path).is_file():
        return path
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
