"""Very long dialogues that are read and then asked about, without being shown again (LoCoMo)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clplat.streams.base import EvalSet, Spec, Stream, Task, spread_rows
from clplat.streams.batch import IGNORE
from clplat.streams.cache_folder import cache_folder, made
from clplat.streams.dialogue_scorer import ADVERSARIAL, KINDS, DialogueAnswers, Question
from clplat.streams.generation_scorers import Together
from clplat.streams.labelled_rows import TokenRows
from clplat.streams.multiple_choice import MultipleChoice
from clplat.streams.reading_rows import ReadingRows, check_reading
from clplat.streams.scorers import Likelihood, Scorer
from clplat.streams.tokenizers import ByteTokenizer, Tokenizer


class DialogueQAStream(Stream):
    """One task for each dialogue: its training rows are its text in order, its test set questions about it.

    The headline is `loss`, nats a token of the right answers (adversarial questions have none); with it, for
    `max_answers` questions, the F1 of what the model writes. Later rows of the result table tell what is forgotten of a
    dialogue while others are read.
    """

    paper = "Maharana et al. 2024, arXiv:2402.17753"

    def __init__(
        self,
        *,
        file: str,
        dialogues: list[str] | None = None,
        max_turns: int | None = None,
        tokenizer: Tokenizer | None = None,
        chunk: int = 1024,
        window: int = 2048,
        passes: int = 2,
        max_questions: int = 200,
        max_answers: int = 200,
        max_new_tokens: int = 32,
        write_unseen: bool = True,
        question_template: str = "Question: {question}\nShort answer:",
        multiple_choice: list[MultipleChoice] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """`file` is LoCoMo's JSON list (variables are expanded), `dialogues` the `sample_id`s to read, in order (None:
        all). `max_turns` reads the beginning of each, and asks only what it tells (by the questions' `evidence`).
        `max_questions` of a dialogue are scored by likelihood and `max_answers` of these are written out, spread
        evenly; without `write_unseen` they are written before any reading and from the dialogue's own turn on.
        `chunk`, `window`, `passes` and `multiple_choice` are as in `BookStream`."""
        check_reading(chunk=chunk, window=window, passes=passes)
        if "{question}" not in question_template:
            raise ValueError("question_template: needs {question}")
        if min(max_questions, max_new_tokens, 1 if max_turns is None else max_turns) < 1 or max_answers < 0:
            raise ValueError("max_questions, max_new_tokens, max_turns, max_answers: at least 1, 1, 1 and 0")
        self.file = Path(os.path.expandvars(file))
        if unset := re.search(r"\$\{?(\w+)", str(self.file)):
            raise ValueError(f"file: {self.file} needs the environment variable {unset[1]}, which is not set")
        if not self.file.is_file():
            raise FileNotFoundError(f"file: there is no file {self.file}")
        for asked in multiple_choice or []:
            asked.check()
        self.names, self.max_turns, self.template = dialogues, max_turns, question_template
        self.chunk, self.window, self.passes = chunk, window, passes
        self.max_questions, self.max_answers, self.max_new_tokens = max_questions, max_answers, max_new_tokens
        self.write_unseen = write_unseen
        self.tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.multiple_choice, self.cache_dir = multiple_choice or [], cache_folder(cache_dir)

    def prepare(self) -> None:
        read = {name: _read(sample, self.max_turns) for name, sample in self._samples().items()}
        texts = [text for text, _ in read.values()]
        source = hashlib.sha256("".join(texts).encode()).hexdigest()
        self.tokenizer.prepare(iter(texts), made(self.cache_dir), source)
        self.spec = Spec(
            kind="language", input_shape=(self.window,), num_outputs=self.tokenizer.vocab_size,
            end_token=self.tokenizer.end_token,
        )  # fmt: skip
        self.begin = [] if self.tokenizer.begin_token is None else [self.tokenizer.begin_token]
        self.lengths: dict[str, int] = {}
        self.tasks = [self._task(index, name, *found) for index, (name, found) in enumerate(read.items())]
        self.probes = [asked.eval_set(self.tokenizer, self.window) for asked in self.multiple_choice]

    def facts(self) -> Mapping[str, Any]:
        """Sizes of every dialogue, and how it is read."""
        return {
            "vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.identity, "chunk": self.chunk,
            "window": self.window, "passes": self.passes,
            **{f"{name}.tokens": length for name, length in self.lengths.items()},
            **{f"{task.name}.questions": len(task.test.data) for task in self.tasks},
        }  # fmt: skip

    def _samples(self) -> dict[str, Any]:
        """The dialogues to read, by name."""
        try:
            every = {sample["sample_id"]: sample for sample in json.loads(self.file.read_text(encoding="utf-8"))}
            if not all({"conversation", "qa"} <= sample.keys() for sample in every.values()):
                raise KeyError("conversation, qa")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"file: {self.file} is no list of dialogues with sample_id, conversation and qa "
                             f"({error!r})") from error  # fmt: skip
        names = list(every) if self.names is None else self.names
        if unknown := [name for name in names if name not in every]:
            raise ValueError(f"dialogues: there is no {unknown[0]!r} in {self.file}; there are {list(every)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"dialogues: each stands there once, and there is at least one; got {names}")
        return {name: every[name] for name in names}

    def _task(self, index: int, name: str, text: str, questions: Sequence[Question]) -> Task:
        tokens = torch.tensor(self.begin + self.tokenizer.encode([text])[0], dtype=torch.int32)
        self.lengths[name] = len(tokens)
        rows = ReadingRows(
            tokens, chunk=self.chunk, window=self.window, end=self.tokenizer.end_token, task=index, passes=self.passes
        )
        asked = [questions[place] for place in spread_rows(len(questions), self.max_questions).tolist()]
        return Task(index=index, name=name, train=rows, test=self._test_set(index, name, asked), headline="loss")

    def _test_set(self, index: int, name: str, asked: Sequence[Question]) -> EvalSet:
        known = [question for question in asked if question.category != ADVERSARIAL]
        if not known:
            raise ValueError(f"dialogue {name!r}: no question about what is read has an answer; raise max_turns or "
                             "max_questions")  # fmt: skip
        scorer: Scorer = Likelihood(token_bytes=self.tokenizer.token_bytes())
        if self.max_answers:
            written = [asked[place] for place in spread_rows(len(asked), self.max_answers).tolist()]
            answers = DialogueAnswers(
                questions=written, prompts=[self._prompt(question, name) for question in written],
                tokenizer=self.tokenizer, max_new_tokens=self.max_new_tokens, tokens_per_row=self.window,
                once_seen=None if self.write_unseen else index,
            )  # fmt: skip
            scorer = Together(scorer, answers)
        return EvalSet(name=name, data=self._answer_rows(known, name, index), scorer=scorer)

    def _answer_rows(self, questions: Sequence[Question], name: str, index: int) -> TokenRows:
        """Prompt, answer and end token a row, of which the latter two are targets."""
        rows = []
        for question in questions:
            whole = self._prompt(question, name)
            answer = self.tokenizer.encode([f" {question.answer}"])[0]
            rows.append((whole, [*answer, self.tokenizer.end_token]))
        width = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        inputs = torch.full((len(rows), width), self.tokenizer.end_token)
        targets = torch.full((len(rows), width), IGNORE)
        for number, (prompt, answer) in enumerate(rows):
            stop = len(prompt) + len(answer) - 1
            inputs[number, :stop] = torch.tensor([*prompt, *answer[:-1]])
            targets[number, len(prompt) - 1 : stop] = torch.tensor(answer)
        return TokenRows(inputs, targets, task=index)

    def _prompt(self, question: Question, name: str) -> list[int]:
        tokens = self.begin + self.tokenizer.encode([self.template.replace("{question}", question.question)])[0]
        if len(tokens) + self.max_new_tokens > self.window:
            raise ValueError(f"dialogue {name!r}: a question of {len(tokens)} tokens and an answer of "
                             f"{self.max_new_tokens} do not fit the window ({self.window}); raise it")  # fmt: skip
        return tokens


def _read(sample: Mapping[str, Any], max_turns: int | None) -> tuple[str, list[Question]]:
    """A dialogue as text, and the questions about what of it is read."""
    conversation, lines, read = sample["conversation"], list[str](), set[str]()
    sessions = sorted((key for key in conversation if re.fullmatch(r"session_\d+", key)), key=_number)
    for key in sessions:
        if max_turns is not None and len(read) >= max_turns:
            break
        lines.append(f"\n{conversation.get(f'{key}_date_time', '')}")
        for turn in conversation[key][: None if max_turns is None else max_turns - len(read)]:
            photo = f" [photo: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            lines.append(f"{turn['speaker']}: {turn['text']}{photo}")
            read.add(turn["dia_id"])
    asked = [row for row in sample["qa"] if int(row["category"]) in KINDS]
    if max_turns is not None:
        asked = [row for row in asked if row["evidence"] and set(row["evidence"]) <= read]
    return "\n".join(lines).strip() + "\n", [_question(row) for row in asked]


def _question(row: Mapping[str, Any]) -> Question:
    category = int(row["category"])
    keys = ("adversarial_answer", "answer") if category == ADVERSARIAL else ("answer",)
    answer = next((str(row[key]) for key in keys if key in row), "")
    return Question(question=row["question"], answer=answer, category=category)


def _number(key: str) -> int:
    return int(key.rpartition("_")[2])
