"""Grade-school arithmetic word problems with worked answers, generated: the embedded question-answer task."""

from __future__ import annotations

import random
from collections.abc import Iterator

from clplat.streams.tokens import Document

NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatma", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
PLACES = ("market", "school", "park", "library", "beach", "station")


def problems(count: int, *, seed: int) -> Iterator[Document]:
    """`count` problems of one to three steps; the answer ends in `#### N`, as in GSM8K."""
    chance = random.Random(seed)
    for _ in range(count):
        yield _problem(chance)


def _problem(chance: random.Random) -> Document:
    name, other = chance.sample(NAMES, 2)
    thing, place = chance.choice(THINGS), chance.choice(PLACES)
    now = chance.randint(2, 20)
    question, work = [f"{name} has {now} {thing}."], []
    for _ in range(chance.randint(1, 3)):
        sentence, step, now = _step(chance, name, other, thing, place, now)
        question.append(sentence)
        work.append(step)
    question.append(f"How many {thing} does {name} have now?")
    return Document(prompt=f"Question: {' '.join(question)}\nAnswer: ", text=f"{' '.join(work)}\n#### {now}")


def _step(
    chance: random.Random, name: str, other: str, thing: str, place: str, now: int
) -> tuple[str, str, int]:
    """One thing that happens, the sum it means, and how many there are afterwards."""
    kinds = ["find", "gift"] + (["lose", "give"] if now > 2 else []) + (["double"] if now <= 30 else [])
    kind = chance.choice(kinds)
    if kind == "double":
        times = chance.choice((2, 3))
        word = {2: "twice", 3: "three times"}[times]
        total = now * times
        return f"Then {name} trades them for {word} as many.", f"{now} * {times} = {total}.", total
    if kind in ("find", "gift"):
        more = chance.randint(2, 20)
        told = f"At the {place} {name} finds {more} more." if kind == "find" else f"{other} gives {name} {more} more."
        return told, f"{now} + {more} = {now + more}.", now + more
    less = chance.randint(1, now - 1)
    told = f"{name} loses {less} at the {place}." if kind == "lose" else f"{name} gives {less} to {other}."
    return told, f"{now} - {less} = {now - less}.", now - less
