"""How the slots are searched, and in which tiles: alternatives, and the choice among them by the shape of a read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Search = Literal["maxima", "lists"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to read.

    `maxima` writes the largest score of every group of slots to memory (4 bytes a query and group, at most
    `LARGEST_BUFFER` at a time) and takes each query's best groups from there: nothing in its loop depends on the data.
    `lists` keeps each query's best groups in registers while it walks over the slots: its memory is k ranks a query and
    part, its loop waits for the rows that found something better.
    """

    search: Search
    group: int
    """Slots of a group: more are fewer maxima and more slots to be scored again."""
    rows: int
    """Queries of a tile."""
    slots: int
    """Slots of a tile."""
    features: int
    """Features at a time; all that there are keep the queries at hand."""
    warps: int
    stages: int
    read_warps: int = 4


LARGEST_BUFFER = 2**24
"""Maxima in memory at once: 64 MB. More queries are searched in several launches."""
PROGRAMS = 1024
"""So many programs keep a card of 132 multiprocessors busy to the end."""


def plan_for(N: int, S: int, D: int, k: int, dtype: torch.dtype) -> Plan:
    """The plan of a read of S slots with keys of D features by N queries."""
    whole = padded(D)
    rows = 64 if N <= 4096 or whole < 128 else 128
    narrow = dtype != torch.float32
    plan = Plan(
        search="maxima", group=32, rows=rows, slots=128, features=min(whole, 128 if narrow else 64),
        warps=4 if rows == 64 else 8, stages=3,
    )  # fmt: skip
    if whole > 128:
        # Every chosen group is read again, a row of keys a slot: with wide keys that costs more than maxima do.
        plan = replace(plan, group=16, features=64 if narrow else 32, rows=128 if N > 64 else 64, warps=8)
    if 64 * padded(k) * plan.group // 32 > S:
        plan = replace(plan, group=8)
    return plan


def padded(width: int) -> int:
    """The power of two that holds so many, and is no smaller than what tensor cores multiply."""
    return max(16, 1 << (width - 1).bit_length())


ALTERNATIVES: dict[str, Plan] = {
    f"{search}, groups of {group}, {rows} × {slots}, {warps} warps, {stages} stages": Plan(
        search=search, group=group, rows=rows, slots=slots, features=128, warps=warps, stages=stages
    )
    for search, group, rows, slots, warps, stages in (
        ("maxima", 32, 64, 128, 4, 3),
        ("maxima", 16, 64, 128, 4, 3),
        ("maxima", 64, 64, 128, 4, 3),
        ("maxima", 32, 128, 128, 8, 3),
        ("maxima", 32, 128, 128, 4, 3),
        ("maxima", 32, 64, 256, 4, 2),
        ("maxima", 32, 128, 256, 8, 3),
        ("lists", 32, 64, 128, 4, 3),
        ("lists", 16, 64, 128, 4, 3),
        ("lists", 16, 64, 64, 4, 3),
        ("lists", 16, 128, 128, 8, 3),
    )
}
"""What benchmarks/topk_memory.py tries; `features` is cut to what the keys have."""
