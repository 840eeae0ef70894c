"""Metrics and settings of a search as a person reads them: one wording for the terminal, the page and MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clplat.metrics import Interval, amount
from clplat.report import SCORES, TRANSFER

UNSEEN = "final_score_unseen_tasks"
"""The final score of those tasks alone that no trial has seen."""
COSTS = {"cost/training_flops": "training operations", "cost/buffer_bytes": "bytes of replay"}
"""What a gain may have been bought with, and what it is called."""
WORDS = {
    **SCORES, **TRANSFER, **COSTS, UNSEEN: "final score, unseen tasks", "average_score": "average score",
    "final_forgetting_first": "final forgetting since learned", "cost/training_seconds": "training seconds",
    "cost/steps": "optimizer steps", "cost/replay_ratio": "replay ratio",
    "cost/peak_memory_bytes": "bytes of peak memory", "cost/parameters": "parameters",
}  # fmt: skip


def named(metric: str) -> str:
    """A metric in words."""
    return WORDS.get(metric, metric)


def number(metric: str, value: float) -> str:
    """A value of a metric: scores to three places, costs as amounts."""
    text = amount(value) if metric.startswith("cost/") else f"{value:.3f}"
    return text.replace("-", "−")


def shown(metric: str, found: Interval, *, sign: bool = False) -> str:
    """A mean with half the width of its interval, where it has one; with its sign if it is a difference."""
    plus = "+" if sign and found.mean >= 0 else ""
    half = f" ± {number(metric, found.half)}" if found.n > 1 else ""
    return f"{plus}{number(metric, found.mean)}{half}"


def setting(value: Any) -> str:
    """A setting in a table."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else amount(value)
    return exact(value)


def exact(value: Any) -> str:
    """A setting in one cell, with all its digits."""
    return json.dumps(value) if isinstance(value, Mapping | list) else str(value)
