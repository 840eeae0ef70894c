"""The learning rate over a task or a stream, as a function of the step alone."""

from __future__ import annotations

import math


def rate_factor(step: int, total: int, schedule: str, warmup: float) -> float:
    """Factor of the learning rate at `step` of `total`: linear warm-up, then constant, cosine or linear decay."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min(1.0, (step - rising) / max(1.0, total - rising))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
