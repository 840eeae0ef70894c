"""Where documents come from: hub data sets and local files, their own splits, or splits by document hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from clplat.streams.base import Budget
from clplat.streams.tokens import Document

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
BUILDERS = ("json", "csv", "text", "parquet")
"""Values of `path` that mean local files."""


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

    `path` is a hub id, at `revision` if given, or "json", "csv", "text" or "parquet" with local `data_files` by part
    (`${VARIABLES}` and wildcards are expanded); with a hub id, `data_files` are files of its repository. Without
    them, `splits` names the set's own splits for train, val and test. What is missing is held out from train. Text
    is in `text_field`, or in `prompt_field` and `answer_field`, with the prompt put in place of `{prompt}` in
    `prompt_template`. `document: heading` joins the lines of WikiText-like files into articles, which begin at
    ` = Title = `; `document: file` makes each text file one document. `max_documents` bounds what is read of each
    split, `max_train_tokens` what is trained on. `exact_match` lets the model answer test prompts and compares what
    follows `answer_marker` (all of it, where the marker is empty). `answers_only` trains on answers and not on
    prompts.
    """

    name: str
    path: str
    config: str | None = None
    revision: str | None = None
    data_files: dict[str, str | list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    text_field: str = "text"
    prompt_field: str | None = None
    answer_field: str = "answer"
    prompt_template: str = "{prompt}\n"
    document: Literal["row", "heading", "file"] = "row"
    holdout: Holdout = field(default_factory=Holdout)
    max_documents: int | None = None
    max_train_tokens: int | None = None
    budget: Budget | None = None
    exact_match: bool = False
    answer_marker: str = "####"
    answers_only: bool = False

    def own_splits(self) -> dict[str, str]:
        """The set's splits by part: as given, or those that `data_files` name, or train alone."""
        return self.splits or {part: part for part in self.data_files} or {"train": "train"}

    def files(self) -> dict[str, list[str]]:
        """Files by part, local ones with variables and wildcards expanded; missing ones are named."""
        found: dict[str, list[str]] = {}
        for part, given in self.data_files.items():
            found[part] = []
            for pattern in [given] if isinstance(given, str) else given:
                path, key = os.path.expandvars(pattern), f"domain {self.name!r}, data_files.{part}"
                if unset := re.search(r"\$\{?(\w+)", path):
                    raise ValueError(f"{key}: {path} needs the environment variable {unset[1]}, which is not set")
                local = self.path in BUILDERS and "://" not in path and not Path(path).is_file()
                paths = sorted(glob(path, recursive=True)) if local else [path]
                if not paths:
                    raise FileNotFoundError(f"{key}: there is no file {path}")
                found[part] += paths
        return found

    def check(self) -> None:
        """Everything that can be known without reading: files, parts, and options that need each other."""
        at = f"domain {self.name!r}"
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"{at}: a name is made of letters, digits, '.', '_' and '-'")
        self.files()
        if unknown := self.own_splits().keys() - set(PARTS):
            raise ValueError(f"{at}: splits and data_files go by train, val and test, not {sorted(unknown)}")
        if self.data_files and self.splits:
            raise ValueError(f"{at}: give data_files by part, or the names of a set's own splits, not both")
        if self.path in BUILDERS and not self.data_files:
            raise ValueError(f"{at}: path {self.path!r} needs data_files")
        if (self.exact_match or self.answers_only) and self.prompt_field is None:
            raise ValueError(f"{at}: exact_match and answers_only need prompt_field")
        if self.prompt_field is not None and ("{prompt}" not in self.prompt_template or self.document != "row"):
            raise ValueError(f"{at}: prompt_field needs {{prompt}} in prompt_template, and document: row")
        if self.document == "file" and self.path != "text":
            raise ValueError(f"{at}: document: file reads text files whole; it needs path: text")

    def source(self) -> str:
        """Identity of the documents (hex): contents of local files, names on the hub, and how they are read."""
        read = ("path", "config", "revision", "splits", "text_field", "prompt_field", "answer_field",
                "prompt_template", "document", "holdout", "max_documents")  # fmt: skip
        options = {name: value for name, value in dataclasses.asdict(self).items() if name in read}
        contents = {part: [_content(path) for path in paths] for part, paths in self.files().items()}
        return hashlib.sha256(json.dumps([options, contents], sort_keys=True).encode()).hexdigest()[:16]

    def split_of(self, part: Part) -> Part:
        """The split that holds a part: its own, or train, from which it is held out."""
        return part if part in self.own_splits() else "train"

    def documents(self, split: Part) -> Iterator[Document]:
        """All documents of one split, in the source's order; none where the set has no such split."""
        own = self.own_splits()
        return self._read(own[split]) if split in own else iter(())

    def part_of(self, document: Document) -> Part:
        """Where a document of the train split belongs, by the hash of its text."""
        own = self.own_splits()
        digest = hashlib.sha256((document.prompt + document.text).encode()).digest()
        share = int.from_bytes(digest[:8]) / 2**64
        if "test" not in own and share < self.holdout.fraction:
            return "test"
        if "val" not in own and self.holdout.fraction <= share < 2 * self.holdout.fraction:
            return "val"
        return "train"

    def _read(self, split: str) -> Iterator[Document]:
        """Documents of one split, empty ones left out; a huge set is read up to `max_documents`."""
        found: Iterator[Document] = map(self._from_row, self.rows(split))
        if self.document == "heading":
            found = (Document(text=article) for article in articles(line.text for line in found))
        return (document for document in islice(found, self.max_documents) if document.text.strip())

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows as `datasets` streams them: nothing is copied to disk."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        files = self.files().get(split)
        if self.document == "file":
            yield from (
                {self.text_field: Path(path).read_text(encoding="utf-8", errors="replace")} for path in files or ()
            )
            return
        # Local files one by one: they may differ in the columns that nobody asked for.
        groups = [[path] for path in files] if files and self.path in BUILDERS else [files]
        for group in groups:
            if group and self.path in BUILDERS and _is_empty(group[0]):
                continue  # `datasets` cannot tell the columns of a file without a byte
            try:
                yield from load_dataset(
                    self.path, self.config, data_files={split: group} if group else None, split=split,
                    streaming=True, revision=self.revision,
                )  # fmt: skip
            except (OSError, ValueError, DatasetsError) as error:
                raise ValueError(self._unreadable(split, group, error)) from error

    def _unreadable(self, split: str, group: list[str] | None, error: Exception) -> str:
        """Which file or set cannot be read, why, and what to do."""
        reason, what = str(error).partition("\n")[0], f"{self.path!r}, split {split!r}"
        if group and self.path in BUILDERS:
            fix = "convert it to UTF-8" if isinstance(error, UnicodeError) else "mend or replace the file"
            return f"domain {self.name!r}: {what} cannot be read from {group[0]} ({reason}); {fix}"
        return (
            f"domain {self.name!r}: {what} cannot be read ({reason}); local files need path "
            f"{', '.join(BUILDERS[:-1])} or {BUILDERS[-1]}"
        )

    def _from_row(self, row: dict[str, Any]) -> Document:
        wanted = [self.text_field] if self.prompt_field is None else [self.answer_field, self.prompt_field]
        for name in wanted:
            if not isinstance(row.get(name), str):
                raise ValueError(
                    f"domain {self.name!r}: rows have no text in the field {name!r}; they have {sorted(row)}"
                )
        text, *prompt = (row[name] for name in wanted)
        return Document(text=text, prompt=self.prompt_template.replace("{prompt}", prompt[0]) if prompt else "")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined into articles; one begins at a top heading ` = Title = `, not at ` = = Section = = `."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r"\s*= [^=](.*[^=])? =\s*", line) and article:
            yield "\n".join(article)
            article = []
        article.append(line.removesuffix("\n"))
    if article:
        yield "\n".join(article)


def _is_empty(path: str) -> bool:
    return Path(path).is_file() and Path(path).stat().st_size == 0


def _content(path: str) -> str:
    """Hash of a local file; an address or a file on the hub stands for itself."""
    if not Path(path).is_file():
        return path
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
