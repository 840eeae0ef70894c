"""Numbers of a configuration that mean nothing: refused by key before anything is built."""

from __future__ import annotations

import math
from typing import Any

from clplat.config import Experiment, flat, plain
from clplat.errors import ConfigError


def check_numbers(config: Experiment) -> None:
    """Refuse what is not a number, not finite, or below its least value."""
    for key, value in flat(plain(config)).items():
        for number in value if isinstance(value, list) else [value]:
            _check_finite(key, number)
    training, evaluation = config.training, config.evaluation
    for key, number, least in (
        ("tasks", config.tasks, 1),
        ("training.batch_size", training.batch_size, 1),
        ("training.accumulate", training.accumulate, 1),
        ("training.threads", training.threads, 1),
        ("training.devices", training.devices, 1),
        ("training.workers", training.workers, 0),
        ("training.warmup", training.warmup, 0),
        ("evaluation.batch_size", evaluation.batch_size, 1),
        ("evaluation.every", evaluation.every, 1),
        ("evaluation.max_rows", evaluation.max_rows, 1),
        ("checkpoint.every_seconds", config.checkpoint.every_seconds, 0),
        ("tracking.log_every", config.tracking.log_every, 1),
    ):
        check_least(key, number, least)
    if training.warmup > 1:
        raise ConfigError(f"training.warmup: is a share of the schedule's span, at most 1; got {training.warmup}")
    if training.clip_norm is not None and training.clip_norm <= 0:
        raise ConfigError(
            f"training.clip_norm: must be positive, got {training.clip_norm}; without it nothing is clipped"
        )


def check_least(key: str, number: float | None, least: int) -> None:
    """Refuse a number below its least value; None is a limit that is not set."""
    if number is not None and number < least:
        raise ConfigError(f"{key}: must be at least {least}, got {number}")


def _check_finite(key: str, value: Any) -> None:
    if not isinstance(value, float) or math.isfinite(value):
        return
    # A bound of a component may be off (LaMAML's `clip`); nothing that trains or counts can be infinite.
    bound = ".init_args." in key and "optimizer.init_args." not in key
    if math.isnan(value) or not bound:
        raise ConfigError(f"{key}: must be a finite number, got {value}")
