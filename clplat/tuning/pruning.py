"""Whether a trial is worth going on with, from its result matrix so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FIRST_BOUNDARY = 2
"""After the first task nothing can have been forgotten, and nothing has been replayed: no trial ends there."""


def worse_than_most(
    values: Sequence[float], finished: Sequence[Sequence[float]], directions: Sequence[int], *, least: int
) -> bool:
    """The median rule (as in Google Vizier, Golovin et al. 2017), over several objectives.

    True where `values` is worse than the median of what at least `least` `finished` trials had at the same boundary,
    of the same seed, in every objective that is known there (NaN is not). A trial that is good in one may be on the
    front.
    """
    if len(finished) < least:
        return False
    behind = []
    for number, direction in enumerate(directions):
        others = [row[number] for row in finished if not math.isnan(row[number])]
        if others and not math.isnan(values[number]):
            behind.append(direction * values[number] < direction * float(np.median(others)))
    return bool(behind) and all(behind)
