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
    """Warps of the program that reads one query's groups and slots."""
    programs: int = 2048
    """Programs that the search is cut into: several rounds of 132 multiprocessors, so that few idle at the end."""


LARGEST_BUFFER = 2**24
"""Maxima in memory at once: 64 MB. More queries are searched in several launches."""


def plan_for(N: int, S: int, D: int, k: int, dtype: torch.dtype) -> Plan:
    """The plan of a read of S slots with keys of D features by N queries."""
    whole, narrow = padded(D), dtype != torch.float32
    # Up to 128 features the queries stay at hand, and two stages of keys leave room for a second program beside each.
    plan = Plan(
        search="maxima", group=32, rows=64, slots=128, features=min(whole, 128 if narrow else 64), warps=4,
        stages=3 if whole <= 64 else 2,
    )  # fmt: skip
    if whole > 128:
        # Every chosen group is read again, a row of keys a slot: with wide keys that costs more than maxima do.
        rows, warps = (128, 8) if N > 64 else (64, 4)
        plan = replace(plan, group=16, features=64 if narrow else 32, rows=rows, warps=warps, stages=3)
    few = 2 * padded(k) * plan.group > S
    return replace(plan, group=8) if few else plan


def padded(width: int) -> int:
    """The power of two that holds so many, and is no smaller than what tensor cores multiply."""
    return max(16, 1 << (width - 1).bit_length())


def _named(plan: Plan) -> tuple[str, Plan]:
    tile = f"{plan.rows} × {plan.slots} × {plan.features}"
    read = f"{plan.read_warps} warps read, {plan.programs} programs"
    return f"{plan.search}, groups of {plan.group}, {tile}, {plan.warps} warps, {plan.stages} stages, {read}", plan


_FIRST = Plan(search="maxima", group=32, rows=64, slots=128, features=128, warps=4, stages=3)

ALTERNATIVES: dict[str, Plan] = dict(
    _named(replace(_FIRST, **change))  # type: ignore[arg-type]
    for change in (
        {},
        {"stages": 2},
        {"stages": 2, "programs": 1024},
        {"stages": 2, "programs": 4096},
        {"stages": 2, "read_warps": 1},
        {"stages": 2, "read_warps": 2},
        {"stages": 2, "group": 16},
        {"stages": 2, "group": 16, "read_warps": 2},
        {"stages": 2, "group": 64},
        {"rows": 128, "warps": 8, "stages": 2},
        {"rows": 128, "stages": 2},
        {"slots": 256, "stages": 2},
        {"rows": 128, "slots": 256, "warps": 8, "stages": 2},
        {"rows": 128, "slots": 256, "warps": 8, "features": 64},
        {"rows": 128, "warps": 8, "features": 64, "group": 16},
        {"rows": 128, "warps": 8, "features": 64, "group": 8},
        {"search": "lists", "stages": 2},
        {"search": "lists", "stages": 2, "group": 16},
        {"search": "lists", "slots": 64, "group": 16},
        {"search": "lists", "stages": 2, "programs": 1024},
    )
)
"""What benchmarks/topk_memory.py tries; where keys have fewer features than a tile, it has as few."""
