"""Which of several things no other beats in every respect: the Pareto front, for reports and for searches."""

from __future__ import annotations

from collections.abc import Sequence


def pareto(values: Sequence[Sequence[float]], directions: Sequence[int]) -> list[bool]:
    """Which rows no other dominates: as good in every objective, and better in one; direction 1 is higher is better."""
    signed = [[d * v for d, v in zip(directions, row, strict=True)] for row in values]
    return [not any(_dominates(other, row) for other in signed) for row in signed]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
