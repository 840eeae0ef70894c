"""A model and its memories as one model without them: memories become rows of the feed-forward layers (§2.5 of the
method's "permanentize"), exactly, up to the rounding of sums.

    from clplat.api import load_model
    from clplat.architectures.locas import export
    export(load_model("runs/STUDY/RUN"), "my_model")    # AutoModelForCausalLM.from_pretrained("my_model")
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

from torch import nn

from clplat.architectures.base import Architecture
from clplat.architectures.locas.model import LocasModel
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.pretrained.saving import write

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")
"""Names under which configurations of `transformers` keep the inner size."""


def dense(model: LocasModel) -> Architecture:
    """A copy of the backbone whose layers hold the permanent and the active memories; the model stays as it is.

    Memories of unequal rank are filled up with empty rows to the largest, since most models have one inner size.
    Rows are rounded to the backbone's precision.
    """
    backbone = copy.deepcopy(model.backbone)
    whole = copy.copy(model)
    whole._modules = {**model._modules, "backbone": backbone}
    names = (*model.permanent, *model.active)
    rows = max(sum(len(side.bank(name).K) for name in names) for side in whole.sideways().values())
    if rows:
        for path, side in whole.sideways().items():
            _put(backbone, path, side.widened(names, rows))
        _tell_width(backbone, rows)
    else:
        for path, side in whole.sideways().items():
            _put(backbone, path, side.base_ffn)
    return cast(Architecture, backbone)


def export(model: LocasModel, folder: str | Path) -> Path:
    """Write the dense model as a folder of `transformers`, with the tokenizer of the model it was made of, if any.
    ValueError where there are no memories, or the backbone is none of the library's models."""
    if not isinstance(model, LocasModel):
        raise ValueError(
            f"export: {type(model).__name__} has no memories to write into its layers; it takes LocasModel"
        )
    joined = dense(model)
    if not isinstance(joined, Pretrained):
        raise ValueError(f"export: {type(model.backbone).__name__} is no model of transformers; keep `dense(model)`")
    return write(joined.backbone, joined.source, folder)


def _put(backbone: nn.Module, path: str, layer: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(holder), name, layer)


def _tell_width(backbone: nn.Module, rows: int) -> None:
    """Raise the inner size in the configuration of a model of transformers."""
    config = getattr(backbone, "config", None)
    if config is None:
        return
    name = next(name for name in WIDTHS if hasattr(config, name))
    before = getattr(config, name)
    setattr(config, name, (4 * config.hidden_size if before is None else before) + rows)
