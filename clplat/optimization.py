"""The optimizer that a configuration names, for the weights of an architecture."""

from __future__ import annotations

import warnings

import torch

from clplat.architectures.base import Architecture, HasLevels
from clplat.components import arguments, resolve
from clplat.config import TrainingConfig
from clplat.errors import ConfigError


def configured_optimizer(training: TrainingConfig, architecture: Architecture) -> torch.optim.Optimizer:
    """The configured optimizer; a class with `for_module` is built from the module, not from a list. A model whose
    levels have periods or rates of their own needs one that has levels."""
    component, key = training.optimizer, "training.optimizer"
    found = resolve(component.class_path, "optimizer", key)
    optimizer: torch.optim.Optimizer
    try:
        if hasattr(found, "for_module"):
            optimizer = found.for_module(architecture, **arguments(component, "optimizer", key))
        else:
            optimizer = found([p for p in architecture.parameters() if p.requires_grad], **component.init_args)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}.init_args: {error}") from error
    _check_levels(optimizer, architecture, found.__name__)
    if getattr(optimizer, "unfinished", "drop") == "carry" and training.optimizer_state == "reset":
        raise ConfigError(
            f"training.optimizer_state: reset would drop what {found.__name__} has gathered in periods that a task "
            "leaves unfinished; use keep, or accept it with unfinished: drop"
        )
    steps = training.budget.steps
    for level, own in getattr(optimizer, "levels", {}).items() if training.optimizer_state == "reset" and steps else ():
        if own.period > steps:
            raise ConfigError(
                f"{key}: level {level} steps once in {own.period} steps, and never does where a task has {steps} and "
                "begins anew (training.optimizer_state: reset); use keep, or a shorter period"
            )
    return optimizer


def warn_of_still_levels(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Say which levels a run of so many steps was too short for."""
    for name, level in getattr(optimizer, "levels", {}).items():
        if level.period > steps:
            warnings.warn(
                f"training.optimizer: level {name} has never stepped: its period is {level.period} steps, and the run "
                f"had {steps}; give it a shorter period, or the run more steps",
                stacklevel=2,
            )


def _check_levels(optimizer: torch.optim.Optimizer, architecture: Architecture, name: str) -> None:
    """Refuse an optimizer that would step every level every time, at one rate."""
    levels = architecture.levels() if isinstance(architecture, HasLevels) else {}
    asked = {level: own for level, own in levels.items() if own.period > 1 or own.lr is not None or own.within}
    if asked and not hasattr(optimizer, "levels"):
        level, own = next(iter(asked.items()))
        raise ConfigError(
            f"training.optimizer: {name} would step the model's level {level} at every step, and at its own rate (the "
            f"level has period {own.period}{'' if own.lr is None else f', lr {own.lr:g}'}); use {{class_path: "
            f"LevelClock, init_args: {{optimizer: {{class_path: {name}, …}}}}}}, or give the level period 1 and no lr"
        )
