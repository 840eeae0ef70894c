"""Labelled text, class by class: intents and topics, for classifiers and for language models that write the label."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.streams.base import Data, EvalSet, Scenario, Spec, Stream, Task, TensorData, spread_rows
from clplat.streams.cache_folder import cache_folder
from clplat.streams.documents import PARTS, Part
from clplat.streams.label_scorer import LabelLikelihood
from clplat.streams.labelled_rows import Example, LabelledSource, TokenRows, answered, json_value, padded
from clplat.streams.scorers import Scorer
from clplat.streams.split import Labelled, class_groups, split_tasks
from clplat.streams.tokenizers import ByteTokenizer, Tokenizer


class LabelledTextStream(Stream):
    """Text classification in groups of classes, as rows of tokens with a class or as text that ends in its label."""

    def __init__(
        self,
        *,
        source: LabelledSource,
        num_tasks: int | None = None,
        class_order: list[str] | Literal["fixed", "seeded"] = "fixed",
        groups: dict[str, list[str]] | str | None = None,
        order: list[str] | list[int] | Literal["seeded"] | None = None,
        scenario: Scenario = "class",
        mode: Literal["classify", "language"] = "classify",
        tokenizer: Tokenizer | None = None,
        max_tokens: int = 128,
        prompt_template: str = "{text}\nlabel:",
        label_score: Literal["sum", "mean"] = "sum",
        max_answers: int = 100,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        """Tasks: `num_tasks` equal parts of the labels in `class_order` (as numbered, drawn by the run's seed, or a
        list of names); or one for each of `groups`, which gives label names by task, or names a JSON file of such
        (`FILE#KEY`: under that key); or, with neither, one for each value of `source.group_field` in order of
        appearance. Labels in no task are left out. `order` permutes tasks, by name or by number. `scenario`: as in
        `SplitDigits`. A text is cut after `max_tokens`.

        `mode: classify` gives rows of tokens and a class each. `mode: language` gives texts in `prompt_template`,
        a space and the words of their label, which alone is learned; the label of highest `label_score` is the
        answer, for `max_answers` rows of a set, evenly spread. Trained tokenizers lie in `cache_dir` (as in
        `TextStream`)."""
        self.source, self.num_tasks, self.class_order, self.groups = source, num_tasks, class_order, groups
        self.order_given, self.scenario, self.mode, self.seed = order, scenario, mode, seed
        self.tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.max_tokens, self.max_answers, self.label_score = max_tokens, max_answers, label_score
        self.prompt_template = prompt_template
        self.cache_dir = cache_folder(cache_dir)
        self._check()

    def _check(self) -> None:
        self.source.check()
        given = {"num_tasks": self.num_tasks, "groups": self.groups, "source.group_field": self.source.group_field}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"{', '.join(given)}: give exactly one of them; it says how labels become tasks")
        if self.num_tasks is None and self.class_order != "fixed":
            raise ValueError("class_order: goes with num_tasks; named groups stand in an `order`")
        if self.max_tokens < 1 or self.max_answers < 1:
            raise ValueError(f"max_tokens, max_answers: at least 1, got {self.max_tokens} and {self.max_answers}")
        if self.prompt_template.count("{text}") != 1:
            raise ValueError(f"prompt_template: needs {{text}} once, got {self.prompt_template!r}")
        if self.mode == "language" and self.scenario == "domain":
            raise ValueError("scenario: domain shares output units between tasks, and labels that are written out have "
                             "none; use class or task, or mode: classify")  # fmt: skip
        if isinstance(self.groups, str):
            self.groups = json_value(self.groups, "groups")
        if self.groups is not None:
            _check_groups(self.groups, "groups")

    def prepare(self) -> None:
        examples = {part: self.source.examples(part) for part in PARTS}
        if not examples["train"]:
            raise ValueError("source: its train part has no row with text")
        labels = self.source.names() or sorted({example.text for example in examples["train"]})
        self._check_known(labels, examples)
        names, groups = self._tasks_of(labels, examples["train"])
        chosen = {labels[label] for group in groups for label in group}
        kept = {part: [row for row in rows if row.text in chosen] for part, rows in examples.items()}
        self.tokenizer.prepare(*self._for_tokenizer(kept["train"]))
        rows = {part: self._encoded(found) for part, found in kept.items()}
        width = max(len(row) for found in rows.values() for row in found)
        number = {label: index for index, label in enumerate(labels)}
        labels_in = {part: [number[row.text] for row in found] for part, found in kept.items()}
        parts: dict[str, Labelled] = {
            part: (padded(found, width, self.tokenizer.end_token), torch.tensor(labels_in[part], dtype=torch.long))
            for part, found in rows.items()
        }
        train, val, test = (parts[part] for part in ("train", "val", "test"))
        spec, tasks = split_tasks(train=train, val=val, test=test, groups=groups, scenario=self.scenario, names=names)
        if self.mode == "classify":
            self.spec = replace(spec, vocab_size=self.tokenizer.vocab_size, pad_token=self.tokenizer.end_token)
            self.tasks = [self._task(task, None, task.test.scorer) for task in tasks]
        else:
            self._write_labels(tasks, width, [labels[label] for group in groups for label in group])

    def _check_known(self, labels: Sequence[str], examples: Mapping[Part, Sequence[Example]]) -> None:
        """Refuse to score labels that were never trained on, where nobody chose the labels."""
        if self.groups is not None or isinstance(self.class_order, list):
            return
        for part, rows in examples.items():
            if unknown := sorted({row.text for row in rows}.difference(labels)):
                raise ValueError(
                    f"source: the {part} part has labels that no training row has ({', '.join(unknown[:5])}); mend "
                    "them, or list the labels to use in class_order or groups"
                )

    def _write_labels(self, tasks: Sequence[Task], width: int, labels: Sequence[str]) -> None:
        """Spec and tasks of a language model; `labels` are the names of the classes in order of appearance."""
        end = self.tokenizer.end_token
        words = self.tokenizer.encode([_spoken(label) for label in labels])
        table = padded(words, max(map(len, words)) + 1, end)
        self.spec = Spec(
            kind="language", input_shape=(width + table.shape[1] - 1,), num_outputs=self.tokenizer.vocab_size,
            scenario=self.scenario, end_token=end,
        )  # fmt: skip
        self.tasks = []
        for task in tasks:
            own = task.classes if self.scenario == "task" else None
            scorer = LabelLikelihood(labels=[[*w, end] for w in words], candidates=own, measure=self.label_score)
            self.tasks.append(self._task(task, table, scorer))

    def _task(self, task: Task, answers: Tensor | None, scorer: Scorer) -> Task:
        """The task with its rows as tokens, continued by the `answers` (C, L) of their class where there are any."""

        def rows(data: Data, limit: int | None = None) -> TokenRows:
            assert isinstance(data, TensorData)
            picked = spread_rows(len(data), limit)
            inputs, targets = data.inputs[picked], data.targets[picked]
            if answers is not None:
                inputs, targets = answered(inputs, answers[targets], self.tokenizer.end_token)
            return TokenRows(inputs, targets, task=task.index)

        def held_out(found: EvalSet) -> EvalSet:
            limit = None if answers is None else self.max_answers
            return EvalSet(name=found.name, data=rows(found.data, limit), scorer=scorer)

        val = None if task.val is None else held_out(task.val)
        return replace(task, train=rows(task.train), test=held_out(task.test), val=val)

    def _tasks_of(
        self, labels: Sequence[str], train: Sequence[Example]
    ) -> tuple[list[str] | None, list[tuple[int, ...]]]:
        """The tasks' names, if they have any, and the numbers of their labels, in the order of training."""
        number = {label: index for index, label in enumerate(labels)}
        names = None
        if self.num_tasks is not None:
            classes = self.class_order
            listed = classes if isinstance(classes, str) else [_known(c, number, "class_order") for c in classes]
            groups = class_groups(listed, num_classes=len(labels), num_tasks=self.num_tasks, seed=self.seed)
        else:
            named = self.groups if isinstance(self.groups, dict) else _groups_in(train)
            names = list(named)
            groups = [tuple(_known(label, number, f"groups.{name}") for label in named[name]) for name in names]
        if self.scenario == "domain" and len(set(map(len, groups))) > 1:
            raise ValueError("scenario: domain needs tasks of as many classes each; these have "
                             f"{[len(group) for group in groups]}")  # fmt: skip
        order = self._order(names or [], len(groups))
        return names and [names[place] for place in order], [groups[place] for place in order]

    def _order(self, names: list[str], count: int) -> list[int]:
        """Places of the tasks in the order of training."""
        if self.order_given is None:
            return list(range(count))
        if self.order_given == "seeded":
            return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        places = [names.index(task) if task in names else task for task in self.order_given]
        if len(places) != count or set(places) != set(range(count)):
            known = names or f"0 to {count - 1}"
            raise ValueError(f"order: name the tasks {known}, each once; got {list(self.order_given)}")
        return [int(place) for place in places]

    def _for_tokenizer(self, train: Sequence[Example]) -> tuple[list[str], Path, str]:
        """What a tokenizer learns from, where it may keep itself, and the identity of the texts."""
        texts = [example.prompt for example in train]
        if self.mode == "language":
            texts = [self.prompt_template.replace("{text}", e.prompt) + _spoken(e.text) for e in train]
        return texts, self.cache_dir, hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def _encoded(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of the texts, cut, and in a language within their template."""
        found = [ids[: self.max_tokens] for ids in self.tokenizer.encode([example.prompt for example in examples])]
        if self.mode == "classify":
            return found
        before, after = self.tokenizer.encode(self.prompt_template.split("{text}"))
        return [[*before, *ids, *after] for ids in found]

    def facts(self) -> Mapping[str, Any]:
        """Vocabulary, and rows of every task."""
        found: dict[str, Any] = {"vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.identity}
        for task in self.tasks:
            found |= {f"{task.name}.train.rows": len(task.train), f"{task.name}.test.rows": len(task.test.data)}
        return found


def _spoken(label: str) -> str:
    """A label as the words that stand behind a prompt."""
    return " " + label.replace("_", " ")


def _known(label: str, number: Mapping[str, int], key: str) -> int:
    if label not in number:
        near = get_close_matches(label, number, n=1)
        raise ValueError(f"{key}: there is no label {label!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return number[label]


def _groups_in(train: Sequence[Example]) -> dict[str, list[str]]:
    """Groups of labels as the rows' own field tells them, in order of appearance; a label has one group."""
    owner: dict[str, str] = {}
    for example in train:
        if owner.setdefault(example.text, example.group) != example.group:
            raise ValueError(f"source.group_field: the label {example.text!r} has rows of two groups, "
                             f"{owner[example.text]!r} and {example.group!r}")  # fmt: skip
    groups: dict[str, list[str]] = {}
    for label, group in owner.items():
        groups.setdefault(group, []).append(label)
    _check_groups(groups, "source.group_field")
    return groups


def _check_groups(groups: object, key: str) -> None:
    if (
        not isinstance(groups, dict)
        or not groups
        or not all(isinstance(labels, list) and labels for labels in groups.values())
    ):
        raise ValueError(f"{key}: a mapping of task names to lists of label names, or a JSON file that holds one")
    for name in groups:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{key}: {name!r} is to name a task, which takes letters, digits, '.', '_' and '-'; "
                             "give `groups` with names of your own")  # fmt: skip
    label, count = Counter(label for labels in groups.values() for label in labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{key}: the label {label!r} stands there {count} times; it can be in one task")
