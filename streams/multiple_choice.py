"""Multiple-choice questions as a probe of what a model knew before: MMLU's, scored by the letters' likelihood."""

from __future__ import annotations

import json
import os
import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clplat.streams.base import EvalSet, spread_rows
from clplat.streams.batch import IGNORE
from clplat.streams.label_scorer import LabelLikelihood
from clplat.streams.labelled_rows import TokenRows
from clplat.streams.tokenizers import Tokenizer

CUE = "Answer:"


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """Questions of a JSON-lines file, one of whose choices is right, as Hendrycks et al. 2021 (arXiv:2009.03300) ask
    them: subject, worked examples, question, lettered choices, and `Answer:`.

    Rows have `question`, `choices` (as many in all rows), `answer` (its number from 0) and `subject`. `examples` names
    a file of rows like these, of which the first `shots` of a subject stand before its questions; those that do not
    fit in `max_tokens` (default: a row of the stream) are left out, the first ones first, and of a question that does
    not fit the end is kept. `max_questions` are spread evenly over the file.
    """

    questions: str
    examples: str | None = None
    shots: int = 5
    name: str = "mmlu"
    max_questions: int = 200
    max_tokens: int | None = None

    def check(self) -> None:
        """Everything that can be known without reading: names, numbers, files."""
        at = f"multiple_choice {self.name!r}"
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"{at}: a name is made of letters, digits, '.', '_' and '-'")
        if self.shots < 0 or self.max_questions < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError(f"{at}: shots, max_questions and max_tokens: at least 0, 1 and 1")
        for key in ("questions", "examples"):
            if (given := getattr(self, key)) is not None and not Path(_expanded(given, f"{at}, {key}")).is_file():
                raise FileNotFoundError(f"{at}, {key}: there is no file {os.path.expandvars(given)}")

    def eval_set(self, tokenizer: Tokenizer, row_length: int) -> EvalSet:
        """The questions as rows (N, T) that end in the right letter, with the scorer that compares all letters."""
        asked, shown = self._rows(self.questions, "questions"), self._shown()
        asked = [asked[place] for place in spread_rows(len(asked), self.max_questions).tolist()]
        letters = string.ascii_uppercase[: len(asked[0]["choices"])]
        labels = _letter_tokens(tokenizer, letters)
        room = (self.max_tokens or row_length) + 1 - max(map(len, labels))
        rows = [[*self._prompt(row, shown[row["subject"]], tokenizer, room), *labels[row["answer"]]] for row in asked]
        width = max(map(len, rows)) - 1
        inputs, targets = torch.full((len(rows), width), tokenizer.end_token), torch.full((len(rows), width), IGNORE)
        for number, (row, question) in enumerate(zip(rows, asked, strict=True)):
            label, end = labels[question["answer"]], len(row) - 1
            inputs[number, :end] = torch.tensor(row[:-1])
            targets[number, end - len(label) : end] = torch.tensor(label)
        scorer = LabelLikelihood(labels=labels, candidates=range(len(letters)))
        return EvalSet(name=self.name, data=TokenRows(inputs, targets, task=-1), scorer=scorer)

    def _shown(self) -> dict[str, list[str]]:
        """The worked examples of every subject, as text."""
        shown: dict[str, list[str]] = defaultdict(list)
        for row in self._rows(self.examples, "examples") if self.examples and self.shots else ():
            if len(shown[row["subject"]]) < self.shots:
                shown[row["subject"]].append(f"{_asked(row)} {string.ascii_uppercase[row['answer']]}\n\n")
        return shown

    def _prompt(self, row: dict[str, Any], shown: Sequence[str], tokenizer: Tokenizer, room: int) -> list[int]:
        """The tokens of one question, with as many of the last examples as fit."""
        subject = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        begin = [] if tokenizer.begin_token is None else [tokenizer.begin_token]
        texts = [head + "".join(shown[first:]) + _asked(row) for first in range(len(shown) + 1)]
        tokens = next((t for t in tokenizer.encode(texts) if len(t) + len(begin) <= room), None)
        if tokens is None:
            tokens = tokenizer.encode(texts[-1:])[0][-(room - len(begin)) :]
        return begin + tokens

    def _rows(self, given: str, key: str) -> list[dict[str, Any]]:
        at = f"multiple_choice {self.name!r}, {key}"
        lines = Path(_expanded(given, at)).read_text(encoding="utf-8").split("\n")
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
            counts = {len(row["choices"]) for row in rows}
            whole = all(isinstance(row["question"], str) and isinstance(row["subject"], str) for row in rows)
            known = all(0 <= row["answer"] < len(row["choices"]) for row in rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{at}: rows need question, choices, answer and subject ({error!r})") from error
        if not rows or len(counts) > 1 or not whole or not known or max(counts) > len(string.ascii_uppercase):
            raise ValueError(f"{at}: needs rows with as many choices each, and an answer among them")
        return rows


def _asked(row: dict[str, Any]) -> str:
    choices = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, row["choices"]))
    return "\n".join([row["question"], *choices, CUE])


def _letter_tokens(tokenizer: Tokenizer, letters: str) -> list[list[int]]:
    """What a tokenizer adds for a letter behind the cue; by itself a letter may be other tokens."""
    cue, *whole = tokenizer.encode([CUE, *(f"{CUE} {letter}" for letter in letters)])
    if all(tokens[: len(cue)] == cue for tokens in whole):
        return [tokens[len(cue) :] for tokens in whole]
    return tokenizer.encode([f" {letter}" for letter in letters])


def _expanded(given: str, key: str) -> str:
    path = os.path.expandvars(given)
    if unset := re.search(r"\$\{?(\w+)", path):
        raise ValueError(f"{key}: {path} needs the environment variable {unset[1]}, which is not set")
    return path
