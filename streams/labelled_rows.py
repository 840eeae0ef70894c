"""Labelled text: where it is read from, and how it stands in memory as rows of tokens."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.streams.base import TensorData
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.documents import Domain, Holdout, Part
from clplat.streams.tokens import Document


@dataclass(frozen=True, kw_only=True)
class Example(Document):
    """A text (`prompt`) and the name of its label (`text`), with the group of labels that its row names."""

    group: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """A set of texts with one label each.

    `path`, `config`, `revision`, `data_files` and `splits` are those of `Domain`: a hub id, or json, csv or parquet
    with local files for train, val and test. Labels are names, or whole numbers that count `label_names`, which is a
    list or a JSON file that holds one (`FILE#KEY`: under that key); without it the training rows tell the labels, in
    alphabetical order. `group_field` names the field that says which group (which domain) a label belongs to. A
    missing val or test part is held out from train by `holdout`; without one, there is no validation set and a test
    part must be given. `max_train_per_class` and `max_eval_per_class` keep the first rows of every class.
    """

    path: str = "json"
    config: str | None = None
    revision: str | None = None
    data_files: dict[str, str | list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    text_field: str = "text"
    label_field: str = "label"
    label_names: list[str] | str | None = None
    group_field: str | None = None
    holdout: Holdout | None = None
    max_train_per_class: int | None = None
    max_eval_per_class: int | None = None

    def check(self) -> None:
        """Everything that can be known without reading the rows."""
        domain = self._domain()
        domain.check()
        needed = ("train",) if self.holdout else ("train", "test")
        if missing := [part for part in needed if part not in domain.own_splits()]:
            raise ValueError(f"source: there is no {missing[0]} part; name it in data_files or splits"
                             + (", or give a holdout" if missing[0] == "test" else ""))  # fmt: skip
        for name in ("max_train_per_class", "max_eval_per_class"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"source.{name}: at least 1, got {limit}")
        self.names()

    def names(self) -> list[str] | None:
        """The labels by number, where they are given."""
        names = self.label_names
        if isinstance(names, str):
            names = json_value(names, "source.label_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("source.label_names: a list of names, or a JSON file of one (FILE#KEY: under a key)")
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"source.label_names: {Counter(names).most_common(1)[0][0]!r} stands there twice")
        return names

    def examples(self, part: Part) -> list[Example]:
        """The rows of one part in the source's order; rows without text are left out."""
        domain, names = self._domain(), self.names()
        own = domain.own_splits()
        split = own.get(part, own["train"] if self.holdout else None)
        if split is None:
            return []
        rows = enumerate(domain.rows(split), start=1)
        found: Iterable[Example] = (self._example(row, names, f"row {place} of {split}") for place, row in rows)
        if self.holdout and split == own["train"]:
            found = (one for one in found if domain.part_of(one) == part)
        limit = self.max_train_per_class if part == "train" else self.max_eval_per_class
        return list(_first_of_each(found, limit))

    def _domain(self) -> Domain:
        return Domain(
            name="labelled_text", path=self.path, config=self.config, revision=self.revision,
            data_files=self.data_files, splits=self.splits, holdout=self.holdout or Holdout(),
        )  # fmt: skip

    def _example(self, row: dict[str, Any], names: list[str] | None, place: str) -> Example:
        """A row, which stands at `place`, as an example."""
        for name in filter(None, (self.text_field, self.label_field, self.group_field)):
            if row.get(name) is None:
                raise ValueError(f"source: {place} has nothing in the field {name!r}; its fields are {sorted(row)}")
        group = str(row[self.group_field]) if self.group_field else ""
        return Example(prompt=str(row[self.text_field]), text=_named(row[self.label_field], names, place), group=group)


def _named(label: object, names: list[str] | None, place: str) -> str:
    """The name of a label that is a name or a number, and stands at `place`."""
    if names is None:
        return str(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    if label not in names:
        raise ValueError(f"source.label_names: {place} has the label {label!r}, not one of the {len(names)} names")
    return str(label)


def _first_of_each(examples: Iterable[Example], limit: int | None) -> Iterator[Example]:
    counts: Counter[str] = Counter()
    for example in examples:
        if example.prompt.strip() and (limit is None or counts[example.text] < limit):
            counts[example.text] += 1
            yield example


def json_value(given: str, key: str) -> Any:
    """What a JSON file holds: `FILE`, or `FILE#NAME` for what stands in it under a name; variables are expanded."""
    file, _, name = os.path.expandvars(given).partition("#")
    if unset := re.search(r"\$\{?(\w+)", file):
        raise ValueError(f"{key}: {file} needs the environment variable {unset[1]}, which is not set")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{key}: there is no file {file}")
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}: {file} is no JSON ({error})") from error
    if not name:
        return value
    if not isinstance(value, dict) or name not in value:
        raise ValueError(
            f"{key}: {file} has no {name!r}; it has {sorted(value) if isinstance(value, dict) else 'a list'}"
        )
    return value[name]


class TokenRows(TensorData):
    """Rows of tokens in memory, as int32 there and as long in a batch.

    Targets (N,) are classes. Targets (N, T) are tokens, and those not ignored are marked as the answer.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, task: int) -> None:
        super().__init__(inputs.int(), targets.int(), task=task)
        self.tokens_per_row = targets.shape[1] if targets.ndim == 2 else 1

    def batch(self, rows: Tensor) -> Batch:
        batch = super().batch(rows)
        answer = batch.targets != IGNORE if batch.targets.ndim == 2 else None
        return batch.replaced(inputs=batch.inputs.long(), targets=batch.targets.long(), answer=answer)


def padded(rows: Sequence[Sequence[int]], width: int, end: int) -> Tensor:
    """Token rows (N, `width`) long, filled up on the right with the end token, which no text contains."""
    return torch.tensor([[*row, *[end] * (width - len(row))] for row in rows], dtype=torch.long).view(-1, width)


def answered(prompts: Tensor, answers: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Prompts (N, P) continued by answers (N, L), both as `padded`, as inputs and targets (N, P + L − 1).

    An answer begins right behind its prompt. Targets are its tokens and one end token; the rest is ignored.
    """
    starts = (prompts != end).sum(1, keepdim=True)
    stops = starts + (answers != end).sum(1, keepdim=True)
    window = torch.cat([prompts, torch.full_like(answers, end)], dim=1)
    window.scatter_(1, starts + torch.arange(answers.shape[1]), answers)
    places = torch.arange(1, window.shape[1])
    return window[:, :-1].contiguous(), window[:, 1:].masked_fill((places < starts) | (places > stops), IGNORE)
