"""Formal languages as symbols with answers: groups to multiply in, counts to compare, brackets to close.

Shapes: N rows, S symbols. Every language gives symbols (N, S) and answers (N, S), both long and numbered from 0;
answers are `IGNORE` where nothing is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clplat.streams.batch import IGNORE

Symbols = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
"""From N, S and a random source to symbols and answers."""


@dataclass(frozen=True, kw_only=True)
class Language:
    """How many symbols it has, whether answers are symbols or no (0) and yes (1), and how rows are drawn.

    `chance` is the accuracy of the best guess without memory. `one_row`: there is one row of each length.
    """

    symbols: int
    draw: Symbols
    chance: float
    answers_symbols: bool = True
    one_row: bool = False


def group(table: Tensor) -> Language:
    """The word problem of a group: after every element, the product of all so far (`table` (G, G): a, then b)."""
    return Language(symbols=len(table), draw=partial(_products, table), chance=1 / len(table))


def cyclic_table(order: int) -> Tensor:
    """Addition modulo `order`; of order 2, parity."""
    return (torch.arange(order).unsqueeze(1) + torch.arange(order)) % order


def permutation_table(degree: int, *, even: bool = False) -> Tensor:
    """All permutations of `degree` things in lexical order, or the even ones: S_n and A_n."""
    found = torch.tensor(list(itertools.permutations(range(degree))))
    if even:
        swapped = (found.unsqueeze(2) > found.unsqueeze(1)).triu(1).sum((1, 2))
        found = found[swapped % 2 == 0]
    weights = degree ** torch.arange(degree)
    codes, order = (found * weights).sum(1).sort()
    after = found[:, found].transpose(0, 1)  # [a, b, i] = b(a(i))
    return order[torch.searchsorted(codes, (after * weights).sum(2))]


def _products(table: Tensor, rows: int, steps: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    symbols = torch.randint(len(table), (rows, steps), generator=chance)
    product, span = symbols, 1
    # Products over spans of 1, 2, 4, … elements; the group's law is associative.
    while span < steps:
        longer = table[product[:, :-span], product[:, span:]]
        product, span = torch.cat([product[:, :span], longer], dim=1), 2 * span
    return symbols, product


def repeated(period: int) -> Language:
    """(aa)* with `period` 2, asked after each letter, or (abab)* with 4, asked after each b: is this a word of it?

    The words asked about are every second one of its words and those that lie half-way between.
    """
    return Language(
        symbols=2, draw=partial(_repeats, period), chance=0.5, answers_symbols=False, one_row=True,
    )  # fmt: skip


def _repeats(period: int, rows: int, steps: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    read, half = torch.arange(1, steps + 1), period // 2
    symbols, inside = (read - 1) % half, (read % period == 0).long()
    return symbols.expand(rows, -1).clone(), inside.masked_fill(read % half != 0, IGNORE).expand(rows, -1).clone()


def counting(letters: int) -> Language:
    """Words aⁿbⁿ (two `letters`) or aⁿbⁿcⁿ (three) in a row, each with an end mark: are all its counts equal?

    Half of the words have one other count, which differs by a multiple of `letters`, so that a word's length modulo
    that number says nothing. Nor does each letter's count alone: it is distributed alike in right and in wrong words.
    Counts go from 2 to about S/8 or S/12, so that longer rows have unseen ones.
    """
    return Language(symbols=letters + 1, draw=partial(_counts, letters), chance=0.5, answers_symbols=False)


def largest_count(letters: int, steps: int) -> int:
    """The largest count in rows of `steps` symbols: such words fill the row about four times, unless it is short.

    Counts from 2 to it are a multiple of `letters`, so that every count has as many others to be wrong by.
    """
    return 1 + letters * max(2, (steps // (4 * letters) - 1) // letters)


def _counts(letters: int, rows: int, steps: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    choices, words = largest_count(letters, steps) - 1, -(-steps // (2 * letters + 1))
    counts = torch.randint(choices, (rows, words), generator=chance)
    wrong = torch.rand(rows, words, generator=chance) < 0.5
    moved = letters * torch.randint(1, choices // letters, (rows, words), generator=chance)
    other = (counts + moved) % choices
    where = torch.randint(letters, (rows, words, 1), generator=chance) == torch.arange(letters)
    lengths = 2 + torch.where(where & wrong.unsqueeze(2), other.unsqueeze(2), counts.unsqueeze(2))
    runs = torch.cat([lengths, torch.ones(rows, words, 1, dtype=torch.long)], dim=2).flatten(1)
    run = torch.searchsorted(runs.cumsum(1), torch.arange(steps).expand(rows, -1).contiguous(), right=True)
    symbols = run % (letters + 1)
    answers = (~wrong).long().gather(1, run // (letters + 1))
    return symbols, answers.masked_fill(symbols != letters, IGNORE)


def brackets(kinds: int, depth: int) -> Language:
    """Dyck-(k, D): brackets of `kinds` kinds, nested at most `depth` deep; which one closes next?

    Asked after a closing bracket that another follows, so that the answer is never the bracket just read.
    """
    return Language(symbols=2 * kinds, draw=partial(_brackets, kinds, depth), chance=1 / kinds)


def _brackets(kinds: int, depth: int, rows: int, steps: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    signs = 2 * torch.randint(2, (rows, steps + 1), generator=chance) - 1
    # A walk reflected at 0 and at `depth`; step t goes from level[t] to level[t + 1].
    free = torch.cat([torch.zeros(rows, 1, dtype=torch.long), signs.cumsum(1)], dim=1)
    level = depth - (free % (2 * depth) - depth).abs()
    opens = level[:, 1:] > level[:, :-1]
    bracket = torch.maximum(level[:, 1:], level[:, :-1])
    kind, at = torch.randint(kinds, (rows, steps + 1), generator=chance), torch.arange(steps + 1)
    for inside in range(1, depth + 1):
        here = bracket == inside
        latest = torch.where(here & opens, at, 0).cummax(1).values
        kind = torch.where(here & ~opens, kind.gather(1, latest), kind)
    symbols = 2 * kind + (~opens).long()
    asked = ~opens[:, :-1] & ~opens[:, 1:]
    return symbols[:, :-1].contiguous(), symbols[:, 1:].masked_fill(~asked, IGNORE)
