"""The optimizer that a configuration names, for the weights of an architecture."""

from __future__ import annotations

import torch

from clplat.architectures.base import Architecture
from clplat.components import arguments, resolve
from clplat.config import TrainingConfig
from clplat.errors import ConfigError


def configured_optimizer(training: TrainingConfig, architecture: Architecture) -> torch.optim.Optimizer:
    """The configured optimizer; a class with `for_module` is built from the module, not from a list."""
    component, key = training.optimizer, "training.optimizer"
    found = resolve(component.class_path, "optimizer", key)
    try:
        if not hasattr(found, "for_module"):
            plain: torch.optim.Optimizer = found(
                [p for p in architecture.parameters() if p.requires_grad], **component.init_args
            )
            return plain
        optimizer: torch.optim.Optimizer = found.for_module(architecture, **arguments(component, "optimizer", key))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}.init_args: {error}") from error
    if getattr(optimizer, "unfinished", "drop") == "carry" and training.optimizer_state == "reset":
        raise ConfigError(
            f"training.optimizer_state: reset would drop what {found.__name__} has gathered in periods that a task "
            "leaves unfinished; use keep, or accept it with unfinished: drop"
        )
    return optimizer
