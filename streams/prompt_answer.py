"""Sequences of question-answer tasks in folders, as TRACE's (Wang et al. 2023, arXiv:2310.06762): answers are learned,
scored by their likelihood, and written out and scored by each task's own metric."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clplat.streams.answer_metrics import AnswerMetric, answer_value
from clplat.streams.answer_rows import answer_rows
from clplat.streams.base import Budget, EvalSet, Task
from clplat.streams.documents import PARTS, Domain, Part
from clplat.streams.examples import ExampleRows, sizes
from clplat.streams.generation_scorers import Together, WrittenAnswers
from clplat.streams.multiple_choice import MultipleChoice
from clplat.streams.scorers import Likelihood, Scorer
from clplat.streams.text import TextStream
from clplat.streams.tokenizers import Tokenizer
from clplat.streams.tokens import Document, TokenData

FILES: dict[Part, tuple[str, ...]] = {
    "train": ("train",), "val": ("eval", "val", "valid", "validation", "dev"), "test": ("test",)
}  # fmt: skip
"""Names that a part's file may have, before .jsonl or .json."""


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """One folder of the stream's root: train, eval (or val) and test files, JSON lines or a JSON list of rows.

    `folder` defaults to the name. `metric` is what a written answer is scored by: `choice` compares the first capital
    letter that stands alone, `number` the first number, the others what their names say. `max_new_tokens` bounds what
    is written (default: the stream's `max_answer_tokens`). `max_examples` bounds what is read of each part.
    """

    name: str
    folder: str | None = None
    metric: AnswerMetric = "exact_match"
    max_new_tokens: int | None = None
    max_examples: int | None = None
    budget: Budget | None = None


class PromptAnswerStream(TextStream):
    """Question-answer tasks, one example a row, of which the answer alone is learned."""

    paper = "Wang et al. 2023, arXiv:2310.06762"
    source_word = "task"

    def __init__(
        self,
        *,
        root: str,
        tasks: list[AnswerTask],
        tokenizer: Tokenizer | None = None,
        max_tokens: int = 512,
        max_answer_tokens: int = 128,
        long_prompts: Literal["cut_left", "refuse"] = "cut_left",
        order: list[str] | None = None,
        probes: list[AnswerTask] | None = None,
        multiple_choice: list[MultipleChoice] | None = None,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        prompt_template: str = "{prompt}",
        max_eval_rows: int = 200,
        max_answers: int = 32,
        write_unseen: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        """`root` holds the tasks' folders (variables are expanded). A row has at most `max_tokens` tokens, prompt and
        answer together; of an answer the first `max_answer_tokens` are kept, and of a prompt that does not fit beside
        it the end, or it is an error (`long_prompts`). Rows are as long as the longest one needs. `order` names tasks
        (default: as listed); `probes` are tasks whose test part is scored and nothing trained. `max_eval_rows` of
        a part are scored by likelihood, spread evenly, and `max_answers` of a test part are written out (0: none).
        Without `write_unseen` a task's answers are written before any training and from its own training on, and not
        while its turn is still to come: most of an evaluation's time is spent on writing. The rest is as in
        `TextStream`. Raises `ValueError` with file and line at the first row whose prompt or answer is missing, blank
        or no text."""
        self.answer_tasks = {task.name: task for task in [*tasks, *(probes or [])]}
        self.root, self.long_prompts = Path(_expanded(root)), long_prompts
        self.write_unseen = write_unseen
        self.max_eval_rows, self.fields, self.template = max_eval_rows, (prompt_field, answer_field), prompt_template
        if max_eval_rows < 1 or max_answers < 0:
            raise ValueError(f"max_eval_rows, max_answers: at least 1 and 0, got {max_eval_rows} and {max_answers}")
        if "{prompt}" not in prompt_template:
            raise ValueError(
                f"prompt_template: {prompt_template!r} has no {{prompt}}, where a row's prompt is to stand"
            )
        for task in self.answer_tasks.values():
            _check(task, max_tokens, max_answer_tokens)
        super().__init__(
            domains=[self._domain(task, PARTS) for task in tasks], tokenizer=tokenizer, block_size=max_tokens,
            order=order, probes=[self._domain(task, ("test",)) for task in probes or []],
            multiple_choice=multiple_choice, max_eval_tokens=max_eval_rows * max_tokens, max_answers=max_answers,
            max_answer_tokens=max_answer_tokens, cache_dir=cache_dir,
        )  # fmt: skip

    def prepare(self) -> None:
        super().prepare()
        self.spec = replace(self.spec, input_shape=(self.row_length,))

    @cached_property
    def row_length(self) -> int:
        """Tokens of every row: what the longest one needs, and the longest prompt with what is written behind it."""
        longest = 2
        for domain in self.domains:
            for part in PARTS:
                longest = max(longest, self._needed(domain, part))
        return min(self.block_size, max([longest, *(self._needed(domain, "test") for domain in self.probe_domains)]))

    def facts(self) -> Mapping[str, Any]:
        """Sizes of every task's sets, and how many prompts and answers were cut."""
        found: dict[str, Any] = {
            "vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.identity,
            "row_length": self.row_length,
        }  # fmt: skip
        for domain in self.domains:
            for part in PARTS:
                prompts, answers = self._cut(domain, part)
                found |= {
                    f"{domain.name}.{part}.examples": self._cache(domain, part).documents,
                    f"{domain.name}.{part}.prompts_cut": prompts, f"{domain.name}.{part}.answers_cut": answers,
                }  # fmt: skip
        return found

    def _domain(self, task: AnswerTask, parts: tuple[Part, ...]) -> Domain:
        """Where the task's rows lie; files are looked for here, so that a missing one is an error at once."""
        folder = self.root / (task.folder or task.name)
        if not folder.is_dir():
            raise FileNotFoundError(f"task {task.name!r}: there is no folder {folder}")
        files: dict[str, str | list[str]] = {}
        for part in parts:
            names = [folder / f"{name}.{ending}" for name in FILES[part] for ending in ("jsonl", "json")]
            if found := next((path for path in names if path.is_file()), None):
                files[part] = str(found)
        needed = "train" if "train" in parts else "test"
        if needed not in files:
            raise FileNotFoundError(
                f"task {task.name!r}: there is no file {needed}.jsonl or {needed}.json in {folder}; a task without "
                "training rows can be a probe"
            )
        return Domain(
            name=task.name, path="json", data_files=files, prompt_field=self.fields[0], answer_field=self.fields[1],
            prompt_template=self.template, max_documents=task.max_examples, budget=task.budget,
        )  # fmt: skip

    def _source(self, domain: Domain) -> str:
        # Not the identity under which a text stream leaves out rows without an answer.
        return f"answers {domain.source()}"

    def _documents(self, domain: Domain, split: Part) -> Iterator[Document]:
        prompt, answer = self.fields
        files = map(Path, domain.files().get(split, []))
        rows = chain.from_iterable(answer_rows(file, prompt_field=prompt, answer_field=answer) for file in files)
        for asked, text in islice(rows, domain.max_documents):
            yield Document(text=text, prompt=self.template.replace("{prompt}", asked))

    def _not_empty(self, data: TokenData, domain: Domain, part: Part) -> None:
        if len(data):
            return
        split = domain.split_of(part)
        read = sum(self._cache(domain, other).documents for other in PARTS if domain.split_of(other) == split)
        at, files = f"task {domain.name!r}", ", ".join(domain.files()[split])
        if not read:
            fields = " and ".join(map(repr, self.fields))
            raise ValueError(f"{at}: there are no rows in {files}; put in one object a row, with the fields {fields}")
        missing = [other for other in PARTS if other not in domain.own_splits()]
        raise ValueError(
            f"{at}: the {read} rows of {files} leave none for its {part} part: where a task has no file of its own for "
            f"{' and '.join(missing)}, a share of {domain.holdout.fraction:g} each is kept from the training rows; add "
            f"{' and '.join(f'{other}.jsonl' for other in missing)}, or more rows"
        )

    def _task(self, index: int, domain: Domain) -> Task:
        train, val = self._rows(domain, "train", index), self._rows(domain, "val", index, self.max_eval_rows)
        self._not_empty(train, domain, "train")
        scored = EvalSet(name=f"{domain.name}/val", data=val, scorer=self._likelihood(domain))
        return Task(
            index=index, name=domain.name, train=train, test=self._test_set(domain, index),
            val=scored if len(val) else None, budget=domain.budget, headline="loss",
        )  # fmt: skip

    def _test_set(self, domain: Domain, index: int) -> EvalSet:
        data = self._rows(domain, "test", index, self.max_eval_rows)
        self._not_empty(data, domain, "test")
        scorer: Scorer = self._likelihood(domain)
        if self.max_answers:
            new = self._new_tokens(domain)
            written = WrittenAnswers(
                cache=data.cache, tokenizer=self.tokenizer, max_prompt_tokens=self.row_length - new, max_new_tokens=new,
                max_examples=self.max_answers, metric=self.answer_tasks[domain.name].metric,
                begin=self.tokenizer.begin_token, once_seen=None if self.write_unseen or index < 0 else index,
            )  # fmt: skip
            scorer = Together(scorer, written)
        return EvalSet(name=domain.name, data=data, scorer=scorer)

    def _likelihood(self, domain: Domain) -> Likelihood:
        return Likelihood(token_bytes=self._lengths)

    def _rows(self, domain: Domain, part: Part, index: int, limit: int | None = None) -> ExampleRows:
        return ExampleRows(
            self._cache(domain, part), length=self.row_length, task=index, max_answer_tokens=self.max_answer_tokens,
            end=self.tokenizer.end_token, begin=self.tokenizer.begin_token, max_rows=limit,
        )  # fmt: skip

    def _new_tokens(self, domain: Domain) -> int:
        return self.answer_tasks[domain.name].max_new_tokens or self.max_answer_tokens

    def _needed(self, domain: Domain, part: Part) -> int:
        """Tokens of the longest row of a part, and of a prompt and what is written behind it; refuses long prompts
        where asked to."""
        prompts, answers = sizes(self._cache(domain, part))
        if self.long_prompts == "refuse" and (count := self._cut(domain, part)[0]):
            raise ValueError(
                f"task {domain.name!r}: {count} prompts of its {part} part do not fit in max_tokens "
                f"({self.block_size}) beside their answers, the longest has {prompts.max()} tokens; raise max_tokens, "
                "or long_prompts: cut_left"
            )
        if not len(prompts):
            return 0
        begin = int(self.tokenizer.begin_token is not None)
        written = self._new_tokens(domain) if part == "test" and self.max_answers else 0
        behind = np.maximum(np.minimum(answers, self.max_answer_tokens) - 1, written)
        return int((begin + prompts + behind).max())

    def _cut(self, domain: Domain, part: Part) -> tuple[int, int]:
        """How many prompts and how many answers of a part do not fit whole."""
        prompts, answers = sizes(self._cache(domain, part))
        kept = np.minimum(answers, self.max_answer_tokens)
        room = self.block_size + 1 - int(self.tokenizer.begin_token is not None) - kept
        return int((prompts > room).sum()), int((answers > kept).sum())


def _check(task: AnswerTask, max_tokens: int, max_answer_tokens: int) -> None:
    longest = max(max_answer_tokens, task.max_new_tokens or 0)
    if longest >= max_tokens - 1:
        raise ValueError(f"task {task.name!r}: answers of {longest} tokens leave no room for a prompt in rows of "
                         f"{max_tokens}; raise max_tokens")  # fmt: skip
    if task.max_examples is not None and task.max_examples < 1:
        raise ValueError(f"task {task.name!r}: max_examples must be at least 1, got {task.max_examples}")
    if task.max_new_tokens is not None and task.max_new_tokens < 1:
        raise ValueError(f"task {task.name!r}: max_new_tokens must be at least 1, got {task.max_new_tokens}; "
                         "max_answers: 0 writes no answers")  # fmt: skip
    if not re.fullmatch(r"[\w.-]+", task.name):
        raise ValueError(f"task {task.name!r}: a name is made of letters, digits, '.', '_' and '-'; folder can be any")
    answer_value(task.metric)


def _expanded(root: str) -> str:
    path = os.path.expandvars(root)
    if unset := re.search(r"\$\{?(\w+)", path):
        raise ValueError(f"root: {path} needs the environment variable {unset[1]}, which is not set")
    return path
