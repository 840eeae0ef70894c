"""How the layers of a backbone compute: compiled, or once more in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_layers(backbone: nn.Module, name: str) -> None:
    """Put the blocks that hidden states pass through one after another, the longest list of modules, through
    torch.compile, for rows and tokens of any number. ValueError where a model, called `name`, has no such list."""
    found = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not found:
        raise ValueError(f"Pretrained.compiled: {name} has no list of layers; use training.compile")
    for layer in max(found, key=len):
        layer.compile(dynamic=True)


def checkpoint_layers(backbone: Any) -> None:
    """Let every layer be computed again in the backward pass; transformers has renamed the method in 5.24."""
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    else:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
