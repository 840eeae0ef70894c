"""A tune's configuration, read and checked as far as nothing has to be built: wrong words cost no wait.

What has to be built, components and streams, `protocol.prepare` checks afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.config import StudyConfig
from clplat.errors import ConfigError, nearest
from clplat.ranges import check_least
from clplat.study_file import load_study
from clplat.tuning.space import dimensions_of

OBJECTIVES = {
    "final_score": 1, "learning_score": 1, "average_score": 1, "backward_transfer": 1, "forward_transfer": 1,
    "final_forgetting": -1, "final_forgetting_first": -1, "cumulative_forgetting": -1,
    "cumulative_forgetting_curve": -1, "cost/training_flops": -1, "cost/training_seconds": -1, "cost/steps": -1,
    "cost/buffer_bytes": -1, "cost/replay_ratio": -1, "cost/peak_memory_bytes": -1, "cost/parameters": -1,
}  # fmt: skip
"""What can be searched for, by the names of docs/metrics.md; 1 where more is better, −1 where less is."""
OF_ONE_TASK = ("final_score", "learning_score", "average_score")
"""Objectives, beside costs, that are known where one task is tuned on: of one alone nothing is forgotten or carried
over."""
TRIALS = 30
"""Trials of a search that says nothing else."""


def load_tune(config: str | Path | Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> StudyConfig:
    """The study that a file, a shipped name or plain data describes, as one that can be searched."""
    study = load_study(config, overrides)
    dimensions_of(study.space, lambda key: None)
    _check_options(study)
    return study


def _check_options(study: StudyConfig) -> None:
    tune = study.tune
    check_least("tune.trials", tune.trials, 1)
    check_least("tune.tasks", tune.tasks, 1)
    check_least("tune.prune_after", tune.prune_after, 1)
    check_least("tune.seeds", min(tune.seeds, default=0), 0)
    if not tune.seeds or len(set(tune.seeds)) != len(tune.seeds):
        raise ConfigError(f"tune.seeds: give at least one, each once; got {tune.seeds}")
    if common := sorted(set(tune.seeds) & set(study.seeds)):
        raise ConfigError(
            f"tune.seeds: {common} are seeds of the report too, which must be fresh; tune with others than "
            f"seeds: {study.seeds}"
        )
    if tune.timeout is not None and tune.timeout <= 0:
        raise ConfigError(f"tune.timeout: must be positive seconds, got {tune.timeout}")
    if not tune.objectives or len(set(tune.objectives)) != len(tune.objectives):
        raise ConfigError(f"tune.objectives: give at least one, each once; got {tune.objectives}")
    for name in tune.objectives:
        if name not in OBJECTIVES:
            raise ConfigError(f"tune.objectives: there is no {name!r}{nearest(name, OBJECTIVES)}")
    if tune.tasks is not None:
        check_objectives(tune.objectives, tune.tasks, f"tune.tasks is {tune.tasks}")
    if tune.storage is not None and "://" not in tune.storage:
        raise ConfigError(f"tune.storage: expected a URL such as postgresql://… or sqlite:///…, got {tune.storage!r}")
    if tune.prune and study.training.devices > 1:
        raise ConfigError("tune.prune: runs of several processes do not ask at their boundaries; set it to false")


def check_objectives(objectives: Sequence[str], tasks: int, why: str) -> None:
    """Refuse what no trial on so many tasks can have; `why` there are so many."""
    for name in objectives if tasks < 2 else ():
        if name not in OF_ONE_TASK and not name.startswith("cost/"):
            raise ConfigError(f"tune.objectives: {name} needs two tasks; {why}")
