"""What the kernels of `mlp_memory` share: activations, where a memory's layers lie, their tiles.

Names in kernels: C tokens of a chunk, D and E the widths of keys and values, J inner features, of which a program
holds BJ at once; a tile's shape stands behind its name, and ij means (C, C).

A memory lies in one row of numbers: pairs of layers, each W1 (D, J) and then W2 (J, E). The first pair are the weights,
the next their momentum if there is any, the last their anchor where chunks may be open.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import load_tile, store_tile

SILU, GELU = tl.constexpr(0), tl.constexpr(1)
ROOT_HALF = tl.constexpr(0.7071067811865476)
BELL = tl.constexpr(0.3989422804014327)


@triton.jit
def activated(x, ACT: tl.constexpr):
    """σ(x)."""
    return x * tl.sigmoid(x) if ACT == SILU else 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF))


@triton.jit
def slope(x, ACT: tl.constexpr):
    """σ′(x)."""
    if ACT == SILU:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    return 0.5 * (1.0 + tl.erf(x * ROOT_HALF)) + x * BELL * tl.exp(-0.5 * x * x)


@triton.jit
def bend(x, ACT: tl.constexpr):
    """σ″(x)."""
    if ACT == SILU:
        s = tl.sigmoid(x)
        return s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    return (2.0 - x * x) * BELL * tl.exp(-0.5 * x * x)


@triton.jit
def load_layers(
    pair, inner, D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The columns `inner` of a pair's first layer, and those rows of its second."""
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    return load_tile(pair, d, D, J, inner, J, UPCAST), load_tile(pair + D * J, inner, J, E, e, E, UPCAST)


@triton.jit
def store_layers(
    pair, first_DJ, second_JE, inner, D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """Writes them."""
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    store_tile(pair, first_DJ, d, D, J, inner, J)
    store_tile(pair + D * J, second_JE, inner, J, E, e, E)


@triton.jit
def load_source(
    kept, anchor, anchored, inner, D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The layers at which a chunk's gradients are taken: its first weights, or the anchor that it was begun with."""
    first_DJ, second_JE = load_layers(kept, inner, D, J, E, BD, BE, UPCAST)
    if OFFSETS:
        if anchored:
            one_DJ, other_JE = load_layers(anchor, inner, D, J, E, BD, BE, False)
            first_DJ, second_JE = one_DJ.to(first_DJ.dtype), other_JE.to(second_JE.dtype)
    return first_DJ, second_JE


@triton.jit
def copied(source, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Copies so many numbers."""
    for first in range(0, COUNT, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(target + place, tl.load(source + place, mask=place < COUNT, other=0.0), mask=place < COUNT)
