"""Texts that are read: every token is learned once a pass, behind what the window holds, and parts are one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.streams.base import spread_rows
from clplat.streams.batch import IGNORE
from clplat.streams.book import Book, BookStream
from clplat.streams.reading_rows import ReadingRows

END = 256


@pytest.mark.parametrize(("length", "chunk", "window"), [(41, 8, 12), (40, 8, 8), (30, 8, 40), (9, 8, 16), (2, 8, 8)])
def test_every_token_but_the_first_is_a_target_once_a_pass_in_order(length: int, chunk: int, window: int) -> None:
    tokens = torch.arange(100, 100 + length, dtype=torch.int32)
    rows = ReadingRows(tokens, chunk=chunk, window=window, end=END, task=3, passes=2)
    assert rows.ordered and len(rows) == 2 * rows.chunks
    batch = rows.batch(torch.arange(len(rows)))
    assert batch.inputs.shape == batch.targets.shape == (len(rows), window) and bool((batch.task == 3).all())
    found: list[int] = []
    for number in range(0, len(rows), 2):
        assert torch.equal(batch.targets[number], batch.targets[number + 1])
        shown, wanted = batch.inputs[number], batch.targets[number]
        learned = wanted[wanted != IGNORE].tolist()
        found += learned
        assert len(learned) == chunk or number == len(rows) - 2
        places = (wanted != IGNORE).nonzero().flatten()
        assert torch.equal(shown[places] + 1, wanted[places])
        # What stands before the chunk: as much as fits, right before it and nothing after it.
        before = min(window + 1 - chunk, learned[0] - 100)
        assert shown[: before + len(learned) - 1].tolist() == list(range(learned[0] - before, learned[-1]))
        assert bool((shown[before + len(learned) - 1 :] == END).all())
    assert found == list(range(101, 100 + length))


def test_parts_show_what_stands_before_them_and_learn_their_own_chunks() -> None:
    tokens = torch.arange(0, 50, dtype=torch.int32)
    whole = ReadingRows(tokens, chunk=8, window=16, end=END, task=0)
    parts = [ReadingRows(tokens, chunk=8, window=16, end=END, task=0, first=a, last=b) for a, b in ((0, 3), (3, 7))]
    joined = torch.cat([part.batch(torch.arange(len(part))).inputs for part in parts])
    assert torch.equal(joined, whole.batch(torch.arange(7)).inputs)
    assert len({whole.digest, *(part.digest for part in parts)}) == 3
    assert sum(part.nbytes for part in parts) == 50 * 4 + 4


def stream(tmp_path: Path, **options: Any) -> BookStream:
    (tmp_path / "tale.txt").write_text("abcdefgh" * 10)
    (tmp_path / "tales.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("first", "second" * 9)))
    books = [Book(name="tale", file=str(tmp_path / "tale.txt")),
             Book(name="second", file=str(tmp_path / "tales.jsonl"), row=1, max_tokens=40)]  # fmt: skip
    made = {"chunk": 8, "window": 16, "passes": 3, "parts": 2, "cache_dir": str(tmp_path / "cache")} | options
    return BookStream(books=options.pop("books", books), **{k: v for k, v in made.items() if k != "books"})


def test_a_book_becomes_tasks_whose_test_sets_are_the_chunks_that_they_read(tmp_path: Path) -> None:
    made = stream(tmp_path)
    made.prepare()
    assert made.order() == "tale_1>tale_2>second_1>second_2"
    assert [len(task.train) for task in made.tasks] == [15, 15, 6, 9]
    for task in made.tasks:
        assert len(task.test.data) == len(task.train) // 3
        assert torch.equal(task.test.data.batch(torch.tensor([1])).inputs, task.train.batch(torch.tensor([4])).inputs)
    assert made.facts()["tale.tokens"] == 80 and made.facts()["second.tokens"] == 40


def test_a_test_set_can_be_fewer_chunks_spread_over_the_part(tmp_path: Path) -> None:
    made = stream(tmp_path, max_eval_rows=2)
    made.prepare()
    task = made.tasks[0]
    assert len(task.train) == 15 and len(task.test.data) == 2
    both = task.test.data.batch(torch.arange(2)).inputs
    assert torch.equal(both, task.train.batch(3 * spread_rows(5, 2)).inputs)
    everything = stream(tmp_path)
    everything.prepare()
    assert task.test.data.digest != everything.tasks[0].test.data.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_eval_rows": 0}, "max_eval_rows: at least one"),
        ({"chunk": 32}, "window: 16 tokens do not hold a chunk of 32"),
        ({"passes": 0}, "chunk, passes: at least 1"),
        ({"parts": 0}, "books, parts, max_eval_rows: at least one of each"),
        ({"books": []}, "books, parts, max_eval_rows: at least one of each"),
        ({"books": [Book(name="a", file="nowhere.txt")]}, "'a', data_files.train: there is no file nowhere.txt"),
        ({"books": [Book(name="a", file="${NOWHERE_SET}/x.txt")]}, "NOWHERE_SET, which is not set"),
        ({"books": [Book(name="a b", file="x.txt")]}, "'a b': its name is made of letters"),
        ({"books": [Book(name="a", file="x.txt")] * 2}, "each needs a name of its own"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stream(tmp_path, **options)


def test_a_book_of_too_few_chunks_and_a_row_that_is_not_there_are_refused_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="80 tokens are 10 chunks of 8, and fewer than parts"):
        stream(tmp_path, parts=11).prepare()
    with pytest.raises(ValueError, match="'x': .*has no row 2 with a text"):
        stream(tmp_path, books=[Book(name="x", file=str(tmp_path / "tales.jsonl"), row=2)]).prepare()
