"""Dialogues are read in order and asked about without being shown; answers are scored as LoCoMo's are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.streams.base import TensorData
from clplat.streams.batch import IGNORE
from clplat.streams.dialogue import DialogueQAStream
from clplat.streams.dialogue_scorer import DialogueAnswers, Question, dialogue_f1
from clplat.streams.tokenizers import ByteTokenizer


def turn(session: int, number: int, speaker: str, text: str, **more: str) -> dict[str, str]:
    return {"speaker": speaker, "dia_id": f"D{session}:{number}", "text": text} | more


SAMPLE: dict[str, Any] = {
    "sample_id": "one",
    "conversation": {
        "speaker_a": "Ann", "session_10": [turn(10, 1, "Ann", "Late.")], "session_10_date_time": "10 May",
        "session_2": [turn(2, 1, "Ann", "I bought a kite."), turn(2, 2, "Bob", "Nice!", blip_caption="a red kite")],
        "session_2_date_time": "2 May",
    },
    "qa": [
        {"question": "What did Ann buy?", "answer": "a kite", "category": 4, "evidence": ["D2:1"]},
        {"question": "When was it late?", "answer": 10, "category": 2, "evidence": ["D10:1"]},
        {"question": "What did Bob buy?", "adversarial_answer": "a kite", "answer": "no", "category": 5,
         "evidence": ["D2:1"]},
    ],
}  # fmt: skip


def stream(tmp_path: Path, samples: Any = None, **options: Any) -> DialogueQAStream:
    (tmp_path / "dialogues.json").write_text(json.dumps([SAMPLE] if samples is None else samples))
    made = {"file": str(tmp_path / "dialogues.json"), "chunk": 16, "window": 64, "max_new_tokens": 4,
            "cache_dir": str(tmp_path / "cache")} | options  # fmt: skip
    return DialogueQAStream(**made)


def test_sessions_are_read_by_number_with_their_dates_speakers_and_photos(tmp_path: Path) -> None:
    made = stream(tmp_path)
    made.prepare()
    (task,) = made.tasks
    text = bytes(task.train.tokens.tolist()).decode()
    assert text == "2 May\nAnn: I bought a kite.\nBob: Nice! [photo: a red kite]\n\n10 May\nAnn: Late.\n"
    assert made.facts()["one.tokens"] == len(text) and task.train.ordered and task.train.passes == 2


def test_questions_stand_without_the_dialogue_and_only_their_answers_count(tmp_path: Path) -> None:
    made = stream(tmp_path)
    made.prepare()
    batch = made.tasks[0].test.data.batch(torch.arange(2))
    for row, (question, answer) in enumerate([("What did Ann buy?", " a kite"), ("When was it late?", " 10")]):
        wanted = batch.targets[row][batch.targets[row] != IGNORE].tolist()
        assert wanted == [*answer.encode(), 256]
        first = int((batch.targets[row] != IGNORE).nonzero()[0])
        assert bytes(batch.inputs[row, : first + 1].tolist()).decode() == f"Question: {question}\nShort answer:"
    assert set(made.tasks[0].test.scorer.metrics) == {
        "loss", "bits_per_byte", "f1", "f1_single_hop", "f1_temporal", "adversarial"
    }  # fmt: skip


def test_a_beginning_is_asked_only_about_what_it_tells(tmp_path: Path) -> None:
    made = stream(tmp_path, max_turns=1)
    made.prepare()
    assert bytes(made.tasks[0].train.tokens.tolist()).decode() == "2 May\nAnn: I bought a kite.\n"
    assert len(made.tasks[0].test.data) == 1
    with pytest.raises(ValueError, match="'one': no question about what is read has an answer"):
        stream(tmp_path, [SAMPLE | {"qa": SAMPLE["qa"][1:]}], max_turns=1).prepare()


@pytest.mark.parametrize(
    ("written", "wanted", "category", "value"),
    [
        ("The kites!\nQuestion: and so on", "a kite", 4, 1.0),
        ("red kite", "kite", 4, 2 / 3),
        ("", "kite", 4, 0.0),
        ("dance, pottery", "pottery, running", 1, 0.5),
        ("yes", "Yes; she likes it", 3, 1.0),
        ("yes", "Yes; she likes it", 2, 2 * 1 / 5),
    ],
)
def test_f1_is_locomos(written: str, wanted: str, category: int, value: float) -> None:
    assert dialogue_f1(written, wanted, category) == pytest.approx(value)


class Parrot:
    """Writes the same to every prompt."""

    def generate(self, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        return [list(b"kite") for _ in prompts]


def test_scores_go_by_kind_and_a_trap_counts_apart() -> None:
    asked = [Question(question="?", answer=a, category=c) for a, c in (("kite", 4), ("dog", 2), ("kite", 5))]
    scorer = DialogueAnswers(
        questions=asked, prompts=[[1], [1, 2], [1]], tokenizer=ByteTokenizer(), max_new_tokens=4, tokens_per_row=8
    )  # fmt: skip
    data = TensorData(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), task=0)
    halves = [scorer.score(Parrot(), data, rows, 2) for rows in torch.arange(2).split(1)]  # type: ignore[arg-type]
    found = {name: (halves[0][name] + halves[1][name]).tolist() for name in scorer.metrics}
    assert found == {"f1": [1, 2], "f1_temporal": [0, 1], "f1_single_hop": [1, 1], "adversarial": [1, 1]}
    assert not scorer.metrics["adversarial"].higher_is_better


class Reader(Parrot):
    """Counts the prompts that it is given together."""

    def __init__(self, seen: list[int]) -> None:
        self.seen, self.together = seen, list[int]()

    def waits_for(self, task: int) -> bool:
        return bool(self.seen) and task not in self.seen

    def generate(self, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        self.together.append(len(prompts))
        return super().generate(prompts, **options)


def test_questions_of_a_later_dialogue_are_answered_before_any_reading_and_all_together(tmp_path: Path) -> None:
    made = stream(tmp_path, [SAMPLE, SAMPLE | {"sample_id": "two"}], write_unseen=False, window=256)
    made.prepare()
    readers = [Reader(seen) for seen in ([], [0], [0, 1])]
    for reader in readers:
        (answers,) = (s for s in made.tasks[1].test.scorer.scorers if isinstance(s, DialogueAnswers))  # type: ignore[attr-defined]
        counted = answers.score(reader, made.tasks[1].test.data, torch.arange(2), 1)["f1"][1]  # type: ignore[arg-type]
        assert counted == (2 if reader.together else 0)
    # One row as long as the window has room for all.
    assert [reader.together for reader in readers] == [[3], [], [3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": "nowhere.json"}, "file: there is no file nowhere.json"),
        ({"file": "${NOWHERE_SET}/x.json"}, "NOWHERE_SET, which is not set"),
        ({"dialogues": ["two"]}, "there is no 'two' in"),
        ({"dialogues": []}, "there is at least one"),
        ({"samples": {"a": 1}}, "is no list of dialogues"),
        ({"samples": [{"sample_id": "x"}]}, "is no list of dialogues"),
        ({"question_template": "?"}, "question_template: needs"),
        ({"max_questions": 0}, "max_questions, max_new_tokens, max_turns, max_answers"),
        ({"window": 8, "chunk": 8}, "do not fit the window"),
        ({"window": 8}, "do not hold a chunk"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stream(tmp_path, **options).prepare()
