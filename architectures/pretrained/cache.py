"""Decoding state of pretrained models as plain tensors: every layer's keys and values, and the position of each column.

Prompts of unequal length are padded on the right; columns that held padding are forgotten as soon as more tokens come,
so that the answers are those of prompts padded on the left.

Shapes: B rows, T new tokens, S columns held, G key-value heads, D head size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, list[tuple[Tensor, Tensor]]]
"""Positions (B, S) long, `NOWHERE` for columns that held padding; keys and values (B, G, S, D) of every layer."""
NOWHERE = 2**31 - 1


def empty(batch_size: int, device: torch.device) -> State:
    """The state before any token."""
    return torch.zeros(batch_size, 0, dtype=torch.long, device=device), []


def continued(held_BS: Tensor, lengths_B: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `width` tokens behind the `lengths` that each row has: positions of all columns (B, S + T), those of the new
    ones (B, T), and who may look where (B, 1, T, S + T)."""
    ends = lengths_B.unsqueeze(1)
    new = ends + torch.arange(width, device=held_BS.device)
    positions = torch.cat([held_BS.masked_fill(held_BS >= ends, NOWHERE), new], dim=1)
    return positions, new, (positions.unsqueeze(1) <= new.unsqueeze(2)).unsqueeze(1)


def argument(model: nn.Module) -> str:
    """How the model's forward calls its cache, which differs between versions of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def as_library(layers: list[tuple[Tensor, Tensor]]) -> Any:
    """The tensors as a cache of transformers; they stay as they are when it grows."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def as_tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """The inverse."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def document_positions(segment_ids: Tensor) -> Tensor:
    """Positions (B, T) that begin at 0 in every document."""
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.zeros_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
