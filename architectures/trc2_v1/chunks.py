"""Chunks of a row, what stands for them, and the one place that decides whether a chunk sees its own future.

As published, a token is told of means over its whole chunk, over its chunk's outputs, and over the whole row: it sees
tokens that it has to predict. With `causal` each of these comes from the chunks before; a chunk's first token, which
all of its tokens may see, stands for it where `first` is asked for.

Shapes: B rows, G chunks, K tokens of a chunk, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.trc2_v1.options import Pooling


def chunked(x_BTC: Tensor, size: int) -> Tensor:
    """(B, G, K, C), filled up with zeros at the end."""
    return F.pad(x_BTC, (0, 0, 0, -x_BTC.shape[1] % size)).unflatten(1, (-1, size))


def joined(x_BGKC: Tensor, length: int) -> Tensor:
    """(B, T, C), the inverse of `chunked`."""
    return x_BGKC.flatten(1, 2)[:, :length]


def summary(x_BGKC: Tensor, pooling: Pooling, *, causal: bool) -> Tensor:
    """What stands for a chunk (B, G, C)."""
    return x_BGKC[:, :, 0] if pooling == "first" else chunk_means(x_BGKC, causal=causal)


def chunk_means(x_BGKC: Tensor, *, causal: bool) -> Tensor:
    """Each chunk's mean (B, G, C), or with `causal` that of the chunk before (0 for the first)."""
    means = x_BGKC.mean(2)
    return F.pad(means[:, :-1], (0, 0, 1, 0)) if causal else means


def row_statistics(x_BGKC: Tensor, *, causal: bool) -> Tensor:
    """Mean and root mean square of every channel (B, G, 2C): over the whole row, or the chunks before (none: 0)."""
    moments = torch.cat([x_BGKC, x_BGKC.square()], dim=-1).mean(2)
    if causal:
        count = torch.arange(x_BGKC.shape[1], device=x_BGKC.device).clamp(min=1).view(-1, 1)
        moments = F.pad(moments.cumsum(1)[:, :-1], (0, 0, 1, 0)) / count
    else:
        moments = moments.mean(1, keepdim=True).expand_as(moments)
    mean, square = moments.chunk(2, dim=-1)
    return torch.cat([mean, (square + 1e-6).sqrt()], dim=-1)


class CausalConvolution(nn.Module):
    """A depthwise convolution over the past and a pointwise one: (…, T, C) to (…, T, C)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.pointwise = nn.Linear(channels, channels, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        rows = x_BTC.flatten(0, -3).transpose(1, 2)
        mixed = self.depthwise(F.pad(rows, (self.depthwise.kernel_size[0] - 1, 0))).transpose(1, 2)
        return self.pointwise(mixed.view_as(x_BTC))
