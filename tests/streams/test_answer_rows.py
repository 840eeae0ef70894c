"""Rows of prompts and answers: each error names file, line, field, value and fix; none is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clplat.streams.answer_rows import answer_rows
from clplat.streams.prompt_answer import AnswerTask, PromptAnswerStream

GOOD = [{"prompt": f"q {number}", "answer": "A"} for number in range(9)]


def read(path: Path, content: str | bytes) -> list[tuple[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(answer_rows(path, prompt_field="prompt", answer_field="answer"))


def lines(bad: str) -> str:
    rows = [json.dumps(row) for row in GOOD]
    return "\n".join([*rows[:7], bad, *rows[7:]])


@pytest.mark.parametrize("content", [
    "\n".join(map(json.dumps, GOOD)), lines(""), "\ufeff" + lines("  ") + "\n", json.dumps(GOOD),
    "\ufeff \n" + json.dumps(GOOD, indent=2) + "\n", "[" + " ,\n ".join(map(json.dumps, GOOD)) + "\n]",
])  # fmt: skip
def test_lines_and_lists_are_read_alike_whatever_stands_between_rows(tmp_path: Path, content: str) -> None:
    assert read(tmp_path / "rows.json", content) == [(row["prompt"], row["answer"]) for row in GOOD]
    assert read(tmp_path / "rows.json", "[\n]") == [] == read(tmp_path / "rows.json", "\n")


@pytest.mark.parametrize(("bad", "said"), [
    ('{"prompt": "x", "answer": ""}', "'answer' is \"\": nothing to learn from; fill it, or take the row out"),
    ('{"prompt": "x", "answer": " \\n"}', r"""'answer' is " \n": nothing to learn"""),
    ('{"prompt": " ", "answer": "A"}', "'prompt' is \" \": nothing to learn"),
    ('{"prompt": "x", "answer": null}', "'answer' is null, not text; fill it, or take the row out"),
    ('{"prompt": "x", "answer": 5}', "'answer' is 5, not text; write it as text: \"5\""),
    ('{"prompt": "x", "reply": "A"}', "the row has no field 'answer', it has ['prompt', 'reply']; add it, or name "
     "another field in answer_field"),
    ('["x", "A"]', 'a row is ["x", "A"], not an object; a file holds JSON lines'),
])  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line_in_lines_and_in_a_list(tmp_path: Path, bad: str, said: str) -> None:
    for name, content in [("rows.jsonl", lines(bad)), ("rows.json", "[" + lines(bad).replace("}\n", "},\n") + "]")]:
        if name == "rows.json" and bad.startswith("["):
            content = content.replace("]\n", "],\n")
        with pytest.raises(ValueError) as error:
            read(tmp_path / name, content)
        assert f"{tmp_path / name}, line 8: " in str(error.value), str(error.value)
        assert said in str(error.value), str(error.value)


@pytest.mark.parametrize(("content", "said"), [
    (b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xe9", "answer": "b"}', "line 2: this is no UTF-8"),
    ('{"data": [{"prompt": "a", "answer": "b"}]}', "line 1: the row has no field 'prompt', it has ['data']"),
    ('[{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b"}]', "line 2: a comma or the list's ']' must"),
    ('[{"prompt": "a", "answer": "b"},\n{"prompt": "a"\n "answer": "b"}]', "line 3: this is no JSON"),
    ('{"prompt": "a", "answer": "b"} {}', "line 1: '{}' stands behind what should be the end"),
    ('[{"prompt": "a", "answer": "b"}\n]\n[]', "line 2: '[]' stands behind"),
    (lines('{"prompt": "x", "answer": "A"'), "line 8: this is no JSON (Expecting ',' delimiter, character 30)"),
    ("[" * 9 + "]" * 8, "line 1: "),
    ('{"prompt": "a", "answer": "' + "b" * 30 + "\\ud800" + '"}', "line 1: 'answer' holds half of a character"),
])  # fmt: skip
def test_a_file_that_is_no_rows_is_told_where_it_stops_being_some(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path / "rows.json", content)
    assert said in str(error.value), str(error.value)


@pytest.mark.parametrize(("files", "said"), [
    ({"train.jsonl": ""}, "task 'sums': there are no rows in {train.jsonl}; put in one object a row"),
    ({"train.jsonl": lines(""), "test.jsonl": "\n"}, "task 'sums': there are no rows in {test.jsonl}; put in one"),
    ({"train.json": json.dumps(GOOD[:1])}, "task 'sums': the 1 rows of {train.json} leave none for its test part: "
     "where a task has no file of its own for val and test, a share of 0.05 each is kept from the training rows; add "
     "val.jsonl and test.jsonl, or more rows"),
    ({"train.json": json.dumps(GOOD), "test.jsonl": '\n{"prompt": "a", "answer": ""}'}, "{test.jsonl}, line 2: "),
])  # fmt: skip
def test_a_part_without_rows_is_named_by_its_file_in_the_streams_own_words(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    folder = tmp_path / "data" / "sums"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
        said = said.replace(f"{{{name}}}", str(folder / name))
    stream = PromptAnswerStream(
        root=str(folder.parent), tasks=[AnswerTask(name="sums", max_new_tokens=4)], max_tokens=24, max_answer_tokens=8,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        stream.prepare()
    assert said in str(error.value), str(error.value)
    assert "block_size" not in str(error.value) and "holdout.fraction" not in str(error.value)
