"""Checks of options, in groups (dataclasses) or of an architecture: ValueError that names the field."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args


def check_choices(options: object, **choices: object) -> None:
    """Refuse a value that is not among its Literal's."""
    for name, kind in choices.items():
        if getattr(options, name) not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise ValueError(f"{_place(options)}{name}: must be one of {known}, got {getattr(options, name)!r}")


def check_finite(options: Any) -> None:
    """Refuse infinite numbers and NaN in any field: they would pass comparisons, and end a run after some steps."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{_place(options)}{field.name}: must be a finite number, got {value}")


def check_idle(options: Any, reason: str, fix: str, *names: str) -> None:
    """Refuse what is given for options that another one of their group, `reason`, leaves without effect."""
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in names and value != field.default:
            raise ValueError(
                f"{_place(options)}{field.name}: {value} has no effect with {reason}; leave it at {field.default}, or "
                f"set {fix}"
            )


def check_at_least(options: object, least: float, *names: str) -> None:
    """Refuse a number below `least`; None stands for a default."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{_place(options)}{name}: must be at least {least}, got {value}")


def _place(options: object) -> str:
    """The option under which a group of options is given, with a dot."""
    group = getattr(options, "group", None)
    return f"{group}." if group else ""


def check_shares(options: object, *names: str) -> None:
    """Refuse a number outside 0..1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{_place(options)}{name}: must lie in 0..1, got {getattr(options, name)}")


def check_sizes(owner: str, **sizes: float | None) -> None:
    """Refuse sizes and counts of `owner` that are not above 0; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and not 0 < size < math.inf:
            bound = "is below 1" if isinstance(size, int) else "is not a positive number"
            raise ValueError(f"{owner}.{name}: {size} {bound}")


def check_dropout(owner: str, dropout: float) -> None:
    """Refuse a share that cannot be dropped; of 1, nothing would be left to learn from."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{owner}.dropout: must be at least 0 and below 1, got {dropout}; 0 turns it off")
