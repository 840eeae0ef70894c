"""A trained `Pretrained` as a plain folder of `transformers`: adapters added into the weights, tokenizer beside them.

import clplat
from clplat.architectures.pretrained.saving import export
export(clplat.load_model("runs/STUDY/RUN"), "my_model")    # AutoModelForCausalLM.from_pretrained("my_model")
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from clplat.architectures.pretrained.dequantise import as_plain, check_new
from clplat.architectures.pretrained.loading import Source
from clplat.architectures.pretrained.model import Pretrained


@torch.no_grad()
def merged(model: Pretrained) -> nn.Module:
    """A copy of the library's model with W + Σ_active (alpha / rank) B A for every W; the model stays as it is.

    Sums are made in the adapters' precision and rounded to the weight's. Which adapters are active, `use_adapters`
    says. ValueError where a weight is also the embeddings' (a tied head): those would change with it.
    """
    backbone = cast(Any, copy.deepcopy(model.backbone))
    embeddings = backbone.get_input_embeddings().weight
    for path, layer in [(path, part) for path, part in backbone.named_modules() if hasattr(part, "lora_A")]:
        weight = layer.base_layer.weight
        if weight is embeddings:
            raise ValueError(f"export: {path} shares its weight with the embeddings, into which an adapter of the head "
                             "cannot be added; train with other lora.targets")  # fmt: skip
        changes = [layer.get_delta_weight(name) for name in model.active]
        weight.copy_(sum(changes, weight.to(torch.promote_types(weight.dtype, torch.float32))))
        holder, _, name = path.rpartition(".")
        setattr(backbone.get_submodule(holder), name, layer.base_layer)
    return backbone.requires_grad_(True)


def export(model: Pretrained, folder: str | Path) -> Path:
    """Write `merged` and the tokenizer of the model it was made of. ValueError for another architecture than
    `Pretrained`: soft prompts are no weights of a plain model, and memories have `locas.export`."""
    if type(model) is not Pretrained:
        raise ValueError(f"export: takes Pretrained, not {type(model).__name__}; for LocasModel there is "
                         "clplat.architectures.locas.export")  # fmt: skip
    return write(merged(model), model.source, folder)


def write(library: nn.Module, source: Source, folder: str | Path) -> Path:
    """Write a model of transformers that came from `source`, with the tokenizer files, where the source has any.
    ValueError for a folder that is not empty."""
    from transformers import AutoTokenizer

    check_new(folder)
    if source.gguf_file is not None:
        as_plain(library, source)
    cast(Any, library).save_pretrained(folder)
    options: dict[str, Any] = {"revision": source.revision or "main", "local_files_only": source.local_files_only}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path(), gguf_file=source.gguf_file, **options)
    except (OSError, ValueError):
        return Path(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
