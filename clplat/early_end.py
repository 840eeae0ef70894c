"""Whether the early end of a task that a budget asks for can come at all."""

from __future__ import annotations

from collections.abc import Sequence

from clplat.config import RunConfig
from clplat.errors import ConfigError, nearest
from clplat.streams.base import Task


def check_early_ends(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Refuse an early end of a task that would never come."""
    for task in tasks:
        thresholds = (task.budget or config.training.budget).thresholds(task.headline)
        if thresholds and config.evaluation.every is None:
            raise ConfigError(
                "training.budget.until: is looked at where tasks are scored inside tasks; set evaluation.every to the "
                "optimizer steps between two looks"
            )
        if thresholds and task.val is None:
            raise ConfigError(
                f"training.budget.until: task {task.name!r} has no validation set to reach a threshold on; give the "
                "stream one (val_fraction or the like), or leave `until` out"
            )
        known = task.val.scorer.metrics if task.val is not None else {}
        if missing := [name for name in thresholds if name not in known]:
            raise ConfigError(
                f"training.budget.until: the validation set of {task.name!r} has no metric {missing[0]!r}"
                f"{nearest(missing[0], known)}"
            )
        for name, threshold in thresholds.items():
            if not known[name].reachable(threshold):
                raise ConfigError(
                    f"training.budget.until: {name} {threshold:g} would never be reached, the best there can be is "
                    f"{known[name].best:g}; give a share, not per cent"
                )
