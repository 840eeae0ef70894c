"""Begin as a trained decoder, whose feed-forward layers become levels (Nested Learning, §7.3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clplat.architectures.continuum_memory.feed import ContinuumFeed
from clplat.architectures.decoder import Decoder
from clplat.architectures.layers import SwiGLU

FEED = ("mlp.gate_up.weight", "mlp.down.weight")
"""A dense block's feed-forward layer, under the block's name."""


def weights_in(path: str) -> Mapping[str, Tensor]:
    """The weights in a file of tensors: a `state_dict` that was saved, or a checkpoint of a run."""
    if not Path(path).is_file():
        raise ValueError(f"start_from: there is no file {path!r}; give a checkpoint (RUN/checkpoints/*.pt)")
    held = torch.load(path, map_location="cpu", weights_only=True)
    return held.get("architecture", held)


@torch.no_grad()
def begin_from(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Give a decoder the weights of a trained one with blocks of the same sizes; every level copies its block's layer.

    What only the new model has, the local targets of token levels, stays as it is. ValueError where anything else is
    missing or of another shape.
    """
    feeds = {f"blocks.{n}.": block.mlp for n, block in enumerate(model.blocks) if isinstance(block.mlp, ContinuumFeed)}
    for place, feed in feeds.items():
        gate_up, down = (_found(weights, place + name) for name in FEED)
        trained = SwiGLU(hidden_size=len(down), inner_size=down.shape[1])
        trained.load_state_dict({"gate_up.weight": gate_up, "down.weight": down})
        try:
            feed.begin_as(trained)
        except RuntimeError as error:
            raise ValueError(f"start_from: {place}mlp has inner size {down.shape[1]}; give the levels the `expand` "
                             f"that makes it ({error})") from error  # fmt: skip
    levels = tuple(place + "mlp." for place in feeds)
    for name, parameter in model.named_parameters():
        if name.startswith(levels):
            continue
        # `Transformer` calls an attention layer's weights without the name of the layer around them.
        own = name if name in weights else name.replace(".attention.attention.", ".attention.")
        found = _found(weights, own)
        if found.shape != parameter.shape:
            raise ValueError(f"start_from: {own} has shape {tuple(found.shape)}, the model needs "
                             f"{tuple(parameter.shape)}")  # fmt: skip
        parameter.copy_(found)


def _found(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"start_from: the file has no {name}; it must hold a decoder with as many blocks and SwiGLU")
    return weights[name]
