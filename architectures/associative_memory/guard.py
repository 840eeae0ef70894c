"""What of a layer's memories became infinite or NaN first, kept on the device until somebody has reason to ask.

A loss that is not a number tells nothing: by the time it is read, all weights are NaN. A normed answer hides a memory
that grows, and clipping by a norm that is infinite spoils every weight at once. So each training pass notes, for every
head, whether what goes into its memory and what comes out was finite, forwards and backwards. Nothing is read, and no
device is waited for. Nothing is noted in evaluation, nor in compiled code, whose graphs take no hooks. Where a pass's
kernels are recorded and replayed, notes are among them, so that passes too are counted on the device; each recording is
rehearsed, which counts as a pass.

Shapes: B rows, T tokens, C hidden size, W projected channels, H heads, E features of a head's answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

QUANTITIES = (
    "what the layer reads",
    "the memory's answers",
    "the gradient that reaches the memory's answers",
    "the gradient that leaves the memory's queries, keys and values",
)
"""In the order of a step. A memory is to blame where what comes out of it, the second and fourth, is the first."""
READ, ANSWERS, REACHES, LEAVES = range(len(QUANTITIES))


class Found(NamedTuple):
    """What was not finite first in one layer."""

    since: int
    """The training pass, counted from 1."""
    quantity: int
    heads: list[int]


class Guard:
    """The first training pass of a layer in which each quantity of each head was not finite."""

    def __init__(self, *, num_heads: int, head_size: int) -> None:
        """`head_size` of each projected part of a head."""
        self.num_heads, self.head_size = num_heads, head_size
        self._since_QH: Tensor | None = None
        self._passes: Tensor | None = None

    def notes(self, x_BTC: Tensor, qkv_BTW: Tensor, answers_BHTE: Tensor) -> None:
        """Notes one pass; its gradients once they flow."""
        if torch.compiler.is_compiling() or not (qkv_BTW.requires_grad and answers_BHTE.requires_grad):
            return
        heads = self.num_heads
        if self._passes is None or self._since_QH is None or self._since_QH.device != x_BTC.device:
            self._since_QH = torch.zeros(len(QUANTITIES), heads, dtype=torch.long, device=x_BTC.device)
            self._passes = torch.zeros((), dtype=torch.long, device=x_BTC.device)
        now = self._passes.add_(1).clone()
        self._note(READ, x_BTC.detach().sum().expand(heads), now)
        self._note(ANSWERS, answers_BHTE.detach().sum((0, 2, 3)), now)
        answers_BHTE.register_hook(lambda slope: self._note(REACHES, slope.sum((0, 2, 3)), now))
        qkv_BTW.register_hook(lambda slope: self._note(LEAVES, self._of_heads(slope), now))

    def first(self) -> Found | None:
        """With what it began; None where all was finite. Waits for the device."""
        if self._since_QH is None:
            return None
        since = self._since_QH.tolist()
        when = min((pass_ for row in since for pass_ in row if pass_), default=0)
        if not when:
            return None
        # Forward before backward, and what goes in before what comes out.
        quantity = next(number for number, row in enumerate(since) if when in row)
        return Found(when, quantity, [head for head, pass_ in enumerate(since[quantity]) if pass_ == when])

    def _note(self, quantity: int, sums_H: Tensor, now: Tensor) -> None:
        assert self._since_QH is not None
        since_H = self._since_QH[quantity]
        since_H.copy_(torch.where((since_H == 0) & ~sums_H.isfinite(), now, since_H))

    def _of_heads(self, channels_BTW: Tensor) -> Tensor:
        """Sums (H,) over all but heads of channels that lie as (parts, H, head size)."""
        return channels_BTW.sum((0, 1)).unflatten(0, (-1, self.num_heads, self.head_size)).sum((0, 2))


def blamed(guards: Mapping[str, Guard]) -> str | None:
    """The layer, heads and quantity with which it began, in words; `guards` from the input to the output, by the names
    of their layers. None where no memory was the first, or none was asked to note anything."""
    found = {name: known for name, guard in guards.items() if (known := guard.first()) is not None}
    begun = min((first.since for first in found.values()), default=0)
    # Forwards the lowest layer is the first; what is not finite there is so in all above, and then in all gradients.
    # Backwards it is the highest, where the gradient that arrives was still finite.
    first = {name: each for name, each in found.items() if each.since == begun}
    forward = [name for name, each in first.items() if each.quantity in (READ, ANSWERS)]
    order = forward or list(reversed(first))
    if not order or first[order[0]].quantity not in (ANSWERS, LEAVES):
        return None
    name, (since, quantity, heads) = order[0], first[order[0]]
    many = f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
    return (
        f"{name}, {many}: {QUANTITIES[quantity]} became infinite or NaN in training pass {since}, before all else; a "
        "memory that grows by itself needs a lower max_rate, or smaller chunks"
    )
