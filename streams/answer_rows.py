"""Rows of a prompt and an answer out of JSON files, each checked where it stands, so that an error names its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 60
"""Characters of a wrong value that an error repeats."""
FORMS = "a file holds JSON lines, one object a line, or one JSON list of objects"


def answer_rows(path: Path, *, prompt_field: str, answer_field: str) -> Iterator[tuple[str, str]]:
    """Prompts and answers in the file's order; empty lines are left out.

    Raises `ValueError` at the first row that is no JSON object, or whose prompt or answer is missing, blank or no
    text: nothing can be learned from it, and to leave it out would change a comparison without a word.
    """
    for line, row in _rows(path):
        at = f"{path}, line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{at}: a row is {_shown(row)}, not an object; {FORMS}")
        yield _text(row, prompt_field, "prompt_field", at), _text(row, answer_field, "answer_field", at)


def _text(row: dict[str, Any], name: str, option: str, at: str) -> str:
    if name not in row:
        raise ValueError(
            f"{at}: the row has no field {name!r}, it has {sorted(row)}; add it, or name another field in {option} "
            f"({FORMS})"
        )
    value = row[name]
    if not isinstance(value, str):
        fix = "fill it, or take the row out" if value is None else f"write it as text: {_shown(json.dumps(value))}"
        raise ValueError(f"{at}: {name!r} is {_shown(value)}, not text; {fix}")
    if not value.strip():
        raise ValueError(f"{at}: {name!r} is {_shown(value)}: nothing to learn from; fill it, or take the row out")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(
            f"{at}: {name!r} holds half of a character (a lone surrogate, \\ud800 to \\udfff); take it out"
        )
    return value


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Every row with its line, counted from 1; what it begins with tells a list from lines, not the file's name."""
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from _listed(path) if start.startswith(b"[") else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if text := _decoded(line, path, number).strip():
                value, end = _value(text, 0, path, number)
                _nothing_behind(text, end, path, number)
                yield number, value


def _listed(path: Path) -> Iterator[tuple[int, Any]]:
    """The members of one list, one by one, since a parser of the whole would not tell where each stands."""
    with path.open("rb") as file:
        text = "".join(_decoded(line, path, number) for number, line in enumerate(file, start=1))
    place, line = _after(text, text.index("[") + 1), 1
    line += text.count("\n", 0, place)
    if text[place : place + 1] == "]":
        _nothing_behind(text, place + 1, path, line)
        return
    while True:
        value, end = _value(text, place, path, line)
        yield line, value
        behind = _after(text, end)
        line += text.count("\n", place, behind)
        if text[behind : behind + 1] == "]":
            _nothing_behind(text, behind + 1, path, line)
            return
        if text[behind : behind + 1] != ",":
            raise ValueError(f"{path}, line {line}: a comma or the list's ']' must stand behind a row; {FORMS}")
        place = _after(text, behind + 1)
        line += text.count("\n", behind, place)


def _value(text: str, place: int, path: Path, line: int) -> tuple[Any, int]:
    """One JSON value and where it ends; `line` is that of its beginning."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except json.JSONDecodeError as error:
        line += text.count("\n", place, error.pos)
        raise ValueError(
            f"{path}, line {line}: this is no JSON ({error.msg}, character {error.colno}); {FORMS}"
        ) from error


def _nothing_behind(text: str, place: int, path: Path, line: int) -> None:
    if rest := text[place:].strip():
        raise ValueError(f"{path}, line {line}: {rest[:SHOWN]!r} stands behind what should be the end; {FORMS}")


def _after(text: str, place: int) -> int:
    """The first place from there on that is no white space."""
    found = re.compile(r"\S").search(text, place)
    return found.start() if found else len(text)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: this is no UTF-8 ({error.reason}); convert the file to it") from error


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
