"""Question-answer rows: one example each, the answer alone learned, long prompts cut on the left, answers written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.streams.batch import IGNORE, Batch
from clplat.streams.multiple_choice import MultipleChoice
from clplat.streams.prompt_answer import AnswerTask, PromptAnswerStream
from clplat.streams.text import TextStream
from clplat.streams.tokenizers import ByteTokenizer
from clplat.streams.tokens import TokenCache

END, BEGIN = ByteTokenizer.end_token, 1
ROWS = [("1+1=", "2"), ("a long question about nothing: ", "no"), ("é?", "an answer of some length")]
TASK = AnswerTask(name="sums", metric="exact_match", max_new_tokens=4)


class BeginTokenizer(ByteTokenizer):
    """Bytes behind a begin token, as Llama's."""

    begin_token = BEGIN


def folder(root: Path, name: str, parts: dict[str, Sequence[tuple[str, str]]], ending: str = "jsonl") -> Path:
    (root / name).mkdir(parents=True)
    for part, rows in parts.items():
        found = [{"prompt": prompt, "answer": answer} for prompt, answer in rows]
        text = json.dumps(found) if ending == "json" else "".join(json.dumps(row) + "\n" for row in found)
        (root / name / f"{part}.{ending}").write_text(text)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "data", "sums", {"train": ROWS, "eval": ROWS[:2], "test": ROWS[:3]})


def made(root: Path, tasks: list[AnswerTask] | None = None, **options: Any) -> PromptAnswerStream:
    given = {
        "max_tokens": 24,
        "max_answer_tokens": 8,
        "cache_dir": str(root.parent / "cache"),
        "tokenizer": ByteTokenizer(),
    }
    stream = PromptAnswerStream(root=str(root), tasks=tasks or [TASK], **given | options)
    stream.prepare()
    return stream


def row(prompt: str, answer: str, length: int, most: int, begin: list[int]) -> tuple[list[int], list[int]]:
    """The definition of one row, in plain Python."""
    learned = [*answer.encode(), END][:most]
    room = length + 1 - len(begin) - len(learned)
    front = begin + list(prompt.encode())[-room:]
    whole = [*front, *learned] + [END] * (length + 1 - len(front) - len(learned))
    targets = [IGNORE] * (len(front) - 1) + learned
    return whole[:-1], targets + [IGNORE] * (length - len(targets))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BeginTokenizer()])
@pytest.mark.parametrize(("length", "most"), [(24, 8), (40, 30), (12, 5)])
def test_a_row_is_what_fits_of_the_prompt_then_the_answer_which_alone_is_a_target(
    root: Path, tokenizer: ByteTokenizer, length: int, most: int
) -> None:
    stream = made(root, max_tokens=length, max_answer_tokens=most, tokenizer=tokenizer)
    data, begin = stream.tasks[0].train, [] if tokenizer.begin_token is None else [BEGIN]
    batch = data.batch(torch.tensor([2, 0, 1]))
    for number, (prompt, answer) in enumerate([ROWS[2], ROWS[0], ROWS[1]]):
        inputs, targets = row(prompt, answer, stream.row_length, most, begin)
        assert batch.inputs[number].tolist() == inputs and batch.targets[number].tolist() == targets
    assert torch.equal(batch.answer, batch.targets != IGNORE) and batch.segment_ids is None


def test_rows_are_as_long_as_the_longest_needs_and_at_most_max_tokens(root: Path) -> None:
    longest = max(len(prompt.encode()) + max(min(len(answer) + 1, 8) - 1, 4) for prompt, answer in ROWS)
    assert made(root, max_tokens=200).spec.input_shape == (longest,)
    assert made(root).spec.input_shape == (24,)


def test_what_was_cut_is_told_and_refused_where_asked_to(root: Path) -> None:
    facts = made(root).facts()
    assert (facts["sums.train.prompts_cut"], facts["sums.train.answers_cut"]) == (1, 1)
    with pytest.raises(
        ValueError, match="task 'sums': 1 prompts of its train part do not fit.*31 tokens; raise max_to"
    ):
        made(root, long_prompts="refuse")
    assert made(root, long_prompts="refuse", max_tokens=60).facts()["sums.train.prompts_cut"] == 0


class Writer:
    """An answerer that writes what a table says, and finds one token likely behind every prompt."""

    def __init__(self, written: dict[str, str], likely: int = 0) -> None:
        self.written, self.likely, self.prompts = written, likely, []

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None) -> list[list[int]]:
        self.prompts += prompts
        texts = [bytes(token for token in prompt if token != BEGIN).decode() for prompt in prompts]
        return [list(self.written.get(text, "").encode())[:max_new_tokens] for text in texts]

    def logits(self, batch: Batch) -> torch.Tensor:
        return 9.0 * torch.nn.functional.one_hot(torch.full_like(batch.inputs, self.likely), END + 1).float()

    def device(self) -> torch.device:
        return torch.device("cpu")


def score(test: Any, model: Writer, size: int = 2) -> dict[str, list[float]]:
    sums = test.scorer.score(model, test.data, torch.arange(len(test.data)), size)
    return {name: pair.tolist() for name, pair in sums.items()}


def test_answers_are_written_from_prompts_behind_the_begin_token_and_scored_by_the_tasks_metric(root: Path) -> None:
    test = made(root, tokenizer=BeginTokenizer(), max_tokens=80).tasks[0].test
    model = Writer({"1+1=": " 2", ROWS[1][0]: "yes"})
    assert score(test, model)["exact_match"] == [1, 3]
    assert sorted(model.prompts) == sorted([[BEGIN, *prompt.encode()] for prompt, _ in ROWS[:3]])
    assert set(score(made(root, max_answers=0).tasks[0].test, model)) == {"loss", "bits_per_byte"}


def test_answers_of_tasks_whose_turn_is_to_come_are_written_before_training_alone_where_asked_for(root: Path) -> None:
    class Trained(Writer):
        seen: list[int] = []

        def waits_for(self, task: int) -> bool:
            return bool(self.seen) and task not in self.seen

    for name in ("more", "never"):
        folder(root, name, {"train": ROWS, "test": ROWS[:3]})
    tasks = [AnswerTask(name="more"), TASK]
    stream = made(root, tasks, write_unseen=False, probes=[AnswerTask(name="never")])
    later, probe, written = stream.tasks[1].test, stream.probes[0], []
    for seen in ([], [0], [0, 1]):
        model = Trained({"1+1=": "2"})
        model.seen = seen
        written.append((score(later, model)["exact_match"][1], score(probe, model)["exact_match"][1]))
        assert score(later, model)["loss"][1] > 0
    assert written == [(3, 3), (0, 3), (3, 3)]


def test_prompts_that_leave_no_room_for_the_answer_are_cut_on_the_left(root: Path) -> None:
    model = Writer({})
    score(made(root, tokenizer=BeginTokenizer()).tasks[0].test, model)
    assert max(map(len, model.prompts)) == 20 and [BEGIN, *ROWS[1][0].encode()[-19:]] in model.prompts


def test_the_headline_is_the_loss_of_answer_tokens_alone(root: Path) -> None:
    task = made(root).tasks[0]
    total, count = score(task.test, Writer({}))["loss"]
    assert task.headline == "loss" and count == 2 + 3 + 8
    assert total / count == pytest.approx(float(torch.log(torch.exp(torch.tensor(9.0)) + END)), rel=1e-6)


def test_json_lists_are_read_parts_without_a_file_are_held_out_and_a_probe_needs_no_training_rows(
    tmp_path: Path,
) -> None:
    rows = [(f"{number}+1=", str(number + 1)) for number in range(300)]
    root = folder(tmp_path / "data", "sums", {"train": rows}, ending="json")
    folder(root, "never", {"test": rows[:5]})
    stream = made(root, probes=[AnswerTask(name="never", metric="number")])
    sizes = [len(data) for data in (stream.tasks[0].train, stream.tasks[0].val.data, stream.tasks[0].test.data)]
    assert sum(sizes) == 300 and all(5 <= size <= 30 for size in sizes[1:])
    assert [(probe.name, len(probe.data)) for probe in stream.probes] == [("never", 5)]
    assert score(stream.probes[0], Writer({"3+1=": "4"}))["accuracy"] == [1, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": [AnswerTask(name="none")]}, "task 'none': there is no folder"),
        ({"tasks": [AnswerTask(name="empty")]}, "task 'empty': there is no file train.jsonl or train.json"),
        ({"max_answer_tokens": 0}, "max_answer_tokens: at least 1, got 0"),
        ({"max_answer_tokens": 23}, "task 'sums': answers of 23 tokens leave no room for a prompt in rows of 24"),
        ({"order": ["other"]}, "order: there is no task 'other'"),
        ({"tasks": [TASK, TASK]}, "tasks, probes: give at least one task, and each its own name"),
        ({"prompt_template": "Q: "}, "prompt_template: 'Q: ' has no {prompt}"),
        ({"tasks": [AnswerTask(name="a/b", folder="sums")]}, "task 'a/b': a name is made of"),
        ({"tasks": [AnswerTask(name="sums", max_examples=0)]}, "task 'sums': max_examples must be at least 1, got 0"),
        ({"max_eval_rows": 0}, "max_eval_rows, max_answers: at least 1 and 0"),
        (
            {"prompt_field": "question"},
            r"train.jsonl, line 1: the row has no field 'question', it has \['answer', 'prompt'\]",
        ),
        (
            {"multiple_choice": [MultipleChoice(questions="none.jsonl")]},
            "'mmlu', questions: there is no file none.jsonl",
        ),
    ],
)
def test_a_wrong_option_is_named(root: Path, options: dict[str, Any], message: str) -> None:
    (root / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        made(root, **options)


def questions(path: Path, count: int) -> str:
    rows = [
        {"question": f"{number}?", "choices": list("wxyz"), "answer": number % 4, "subject": ("a_b", "c")[number % 2]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_multiple_choice_row_ends_in_the_letter_behind_as_many_examples_of_its_subject_as_fit(
    root: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"examples": questions(tmp_path / "dev", 4), "shots": 2, "max_tokens": 155}
    asked = MultipleChoice(questions=questions(tmp_path / "test", 8), **options)
    stream = made(root, multiple_choice=[asked], tokenizer=BeginTokenizer())
    data = stream.probes[0].data.batch(torch.arange(8))
    said = [bytes(t for t in inputs if t not in (BEGIN, END)).decode() for inputs in data.inputs.tolist()]
    head = "The following are multiple choice questions (with answers) about a b.\n\n"
    body = "{}?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert 1 + len((head + body.format(2) + " C\n\n" + body.format(0) + " A").encode()) <= 156 < 150 + len(body)
    assert said[0] == head + body.format(2) + " C\n\n" + body.format(0) + " "
    assert data.inputs[0, 0] == BEGIN and (data.inputs[1] == END).any()
    letters = [[t for t in targets if t != IGNORE] for targets in data.targets.tolist()]
    assert [bytes(tokens) for tokens in letters] == [f" {letter}".encode() for letter in "ABCDABCD"]


def test_multiple_choice_is_a_probe_of_any_text_stream_and_compares_the_likelihood_of_letters(
    root: Path, tmp_path: Path
) -> None:
    text = {"name": "text", "path": "text", "data_files": {part: str(root / "t.txt") for part in ("train", "test")}}
    (root / "t.txt").write_text("some text\n" * 40)
    from clplat.streams.documents import Domain

    asked = MultipleChoice(questions=questions(tmp_path / "test", 8), max_tokens=200)
    stream = TextStream(
        domains=[Domain(**text)], block_size=16, multiple_choice=[asked], cache_dir=str(tmp_path / "cache")
    )
    stream.prepare()
    for number, letter in enumerate("ABCD"):
        found = score(stream.probes[0], Writer({}, likely=ord(letter)), size=3)
        assert found["accuracy"] == [2, 8], number


def test_the_cache_is_the_one_that_text_streams_write(root: Path) -> None:
    stream = made(root)
    assert isinstance(stream.tasks[0].train.cache, TokenCache)
    assert stream.tasks[0].train.cache.document(0) == (list(b"1+1="), list(b"2"))
    again = made(root)
    assert again.tasks[0].train.digest == stream.tasks[0].train.digest
    assert made(root, max_answer_tokens=9).tasks[0].train.digest != stream.tasks[0].train.digest
