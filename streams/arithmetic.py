"""Grade-school arithmetic word problems with worked answers, generated: the embedded question-answer task."""

from __future__ import annotations

import random
from collections.abc import Iterator

from clplat.streams.tokens import Document

NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatma", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
PLACES = ("market", "school", "park", "library", "beach", "station")

STARTS = (
    "{name} has {now} {things}.",
    "{name} starts the day with {now} {things}.",
    "There are {now} {things} on {name}'s desk.",
)
QUESTIONS = ("How many {things} does {name} have now?", "How many {things} are there in the end?")
EVENTS = {
    "+": (
        "At the {place} {name} finds {by} more.",
        "{other} gives {name} {by} more.",
        "{name} buys another {by} at the {place}.",
    ),
    "-": (
        "{name} loses {by} of them at the {place}.",
        "{name} gives {by} of them to {other}.",
        "{other} borrows {by} of them.",
    ),
    "*": (
        "After a trade with {other} there are {by} times as many.",
        "By the evening {name} has {by} times as many.",
    ),
    "/": (
        "They are shared equally among {by} children, and {name} keeps one share.",
        "{name} puts them into {by} equal bags and keeps one bag.",
    ),
}  # fmt: skip
"""Ways to tell that the number grows, shrinks, is multiplied or divided by `by`."""


def problems(count: int, *, seed: int) -> Iterator[Document]:
    """`count` problems of one to three steps over whole numbers; the answer ends in `#### N`, as in GSM8K."""
    chance = random.Random(seed)
    for _ in range(count):
        yield _problem(chance)


def _problem(chance: random.Random) -> Document:
    name, other = chance.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": chance.choice(THINGS)}
    now = chance.randint(2, 20)
    told, work = [chance.choice(STARTS).format(now=now, **words)], []
    for _ in range(chance.randint(1, 3)):
        sign, by, then = _step(chance, now)
        told.append(chance.choice(EVENTS[sign]).format(by=by, place=chance.choice(PLACES), **words))
        work.append(f"{now} {sign} {by} = {then}.")
        now = then
    told.append(chance.choice(QUESTIONS).format(**words))
    return Document(prompt=f"Question: {' '.join(told)}\nAnswer: ", text=f"{' '.join(work)}\n#### {now}")


def _step(chance: random.Random, now: int) -> tuple[str, int, int]:
    """An operation that keeps the number whole, positive and small: sign, operand, result."""
    shares = [by for by in (2, 3, 4, 5) if now % by == 0 and now > by]
    sign = chance.choice("++-*/" if shares else "++-*") if 2 < now <= 40 else chance.choice("+-" if now > 2 else "+*")
    if sign == "+":
        by = chance.randint(2, 20)
        return sign, by, now + by
    if sign == "-":
        by = chance.randint(1, now - 1)
        return sign, by, now - by
    if sign == "*":
        by = chance.choice((2, 3))
        return sign, by, now * by
    by = chance.choice(shares)
    return sign, by, now // by
