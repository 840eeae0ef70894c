"""The `tune:` block of a configuration: how its `space:` is searched, on what, and by what trials are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clplat.components import Component

TUNE_FILE = "tune.yaml"
"""By this file in it a folder is that of a tune."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How `clplat tune` searches. The study's own `seeds` are those of the report on the full stream."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Tree-structured Parzen estimator, independent draws, or every point of a grid (choices, ranges with a step)."""
    trials: int | None = None
    """Trials in all, the default settings included; 30 if not given, every point where the sampler is grid."""
    objectives: list[str] = field(default_factory=lambda: ["final_score"])
    """Metrics of a run by their names in MLflow. The first chooses the best of the front."""
    tasks: int | None = None
    """The first so many tasks are tuned on; half of them if not given, at least 2."""
    development: Component | None = None
    """A stream to tune on in place of the first tasks."""
    on_test_sequence: bool = False
    """Tune on the sequence that is reported. The record says so."""
    variant: str | None = None
    """The variant that is tuned, where the study has variants."""
    seeds: list[int] = field(default_factory=lambda: [1000])
    """Seeds of every trial; none of them may be one of the report's."""
    sampler_seed: int = 0
    """What the sampler draws follows from this and the number of the trial."""
    prune: bool = True
    """End trials at a boundary where they are worse than the median of finished ones."""
    prune_after: int = 5
    """Finished trials that a boundary is compared with, at least."""
    timeout: float | None = None
    """Seconds after which no trial but a first one is begun, counted anew when a tune is resumed."""
    storage: str | None = None
    """An Optuna RDB URL that several tunes share, on one machine or many; a SQLite file in the folder if not given."""
