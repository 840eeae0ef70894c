"""Memories of one head that learn under one key, one step size and one decay: written together, a chunk at once.

Their first layers read the same keys, so they are one matrix with the outputs side by side: one triangular system
erases in all of them. Layers behind the first read what their own memory made.

Shapes as in `associative_memory/state.py`, with n memories of H heads as heads n·H, memory after memory. Between chunks
a first layer is kept `stacked`, (B, H, I, n·O), so that no chunk moves a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.state import Layers, Tokens
from clplat.architectures.hope.gates import End, Left, lefts
from clplat.architectures.hope.options import Read

SHORTEST = 1e-12
"""Inputs are divided by their length, or by this where it is less, as `torch.nn.functional.normalize` does."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the tokens of a chunk write to one layer, and what they read; with n memories as a dimension behind rows,
    but for first layers, whose outputs lie side by side."""

    along: Tensor
    """(…, L, I)."""
    unit: Tensor
    """The same of unit length."""
    step: Tensor
    """(…, L, O)."""
    erased: Tensor | None
    """(…, L, O); None where nothing is."""
    W: Tensor
    """(…, I, O) before the chunk."""
    S: Tensor | None

    def of_last(self, width: int) -> Written:
        """Of the last memory alone, as if it were the only one; its answers are `width` wide."""
        if self.W.ndim == 4:
            step, erased, W, S = (
                None if part is None else part.split([part.shape[-1] - width, width], -1)[1]
                for part in (self.step, self.erased, self.W, self.S)
            )
            along, unit = self.along, self.unit
        else:
            along, unit, step, erased, W, S = (
                None if part is None else part[:, -1]
                for part in (self.along, self.unit, self.step, self.erased, self.W, self.S)
            )
        assert along is not None and unit is not None and step is not None and W is not None
        return Written(along=along, unit=unit, step=step, erased=erased, W=W, S=S)

    def read(self, x: Tensor, left: Left, *, known: Tensor | None = None) -> Tensor:
        """The layer's outputs, each by the weights as `left` has them; `known` is what W gives, if that is known."""
        answer = left.start * (x @ self.W if known is None else known)
        if self.S is not None and left.carried is not None:
            answer = answer + left.carried * (x @ self.S)
        answer = answer + ((x @ self.along.mT) * left.steps) @ self.step
        return answer if self.erased is None else answer + ((x @ self.unit.mT) * left.kept) @ self.erased

    def behind(self, end: End) -> tuple[Tensor, Tensor | None]:
        """Weights and momentum behind the chunk."""
        weight, pushed = end.start * self.W, None
        if self.S is not None and end.carried is not None and end.pushes is not None and end.pushed is not None:
            weight = weight + end.carried * self.S
            pushed = end.pushed * self.S + self.along.mT @ (end.pushes * self.step)
        if self.erased is not None and self.unit is self.along:
            return weight + self.along.mT @ (end.steps * self.step + end.kept * self.erased), pushed
        weight = weight + self.along.mT @ (end.steps * self.step)
        return weight if self.erased is None else weight + self.unit.mT @ (end.kept * self.erased), pushed


@dataclass(frozen=True, kw_only=True)
class Bank:
    """`count` memories a head; weights are passed in, first layers stacked."""

    network: Network
    count: int

    def answers(self, weights: Layers, x_BHTD: Tensor) -> tuple[Tensor, ...]:
        """What the first `count` of several memories give to x, (B, H, T, D) of each, by weights all tokens share.
        x may be (B, H, T, count, D), an input for each."""
        heads, wide = self.count * x_BHTD.shape[1], self.count * self._width(weights)
        first = weights[0].split([wide, weights[0].shape[-1] - wide], -1)[0]
        layers = (first, *(part.split([heads, part.shape[1] - heads], 1)[0] for part in weights[1:]))
        if x_BHTD.ndim == 5:
            read = self.network.read(self.unstacked(layers), x_BHTD.permute(0, 3, 1, 2, 4).flatten(1, 2))
        else:
            read = self._read(layers, x_BHTD)
        return read.unflatten(1, (self.count, -1)).unbind(1)

    def last_answers(self, weights: Layers, x_BHTD: Tensor) -> Tensor:
        """What the last memory gives to x."""
        return self.network.read(self.of_last(weights, x_BHTD.shape[1]), x_BHTD)

    def of_last(self, weights: Layers, heads: int) -> Layers:
        """The weights of the last memory."""
        return (weights[0][..., -self._width(weights) :], *(part[:, -heads:] for part in weights[1:]))

    def copied(self, tokens: Tokens) -> Tokens:
        """The tokens for each memory, as further heads."""
        return tokens._replace(
            q=self._copied(tokens.q), k=self._copied(tokens.k), v=self._copied(tokens.v),
            rate=self._copied(tokens.rate), log_decay=tuple(self._copied(gate) for gate in tokens.log_decay),
            log_momentum=None if tokens.log_momentum is None else self._copied(tokens.log_momentum),
            erase=None if tokens.erase is None else self._copied(tokens.erase),
        )  # fmt: skip

    def written(
        self, tokens: Tokens, W: Layers, S: Layers, anchor: Layers, read: Read | None,
        momenta: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor | None, Layers, Layers]:  # fmt: skip
        """One chunk, or a part of it, of L tokens of H heads, with gradients at `anchor`: what the last memory answers
        to the queries, (B, H, L, D), None where nobody asks, and weights and momentum of all behind the tokens.
        `momenta` are the chunk's own of `gates.Momenta`."""
        log_decay = tokens.log_decay[0].squeeze(-1) if tokens.log_decay else torch.zeros_like(tokens.rate)
        pushes, pushed = momenta or (None, None)
        before, asked, end = lefts(log_decay, pushes, pushed, tokens.counts, behind=read == "after")
        inputs, slopes, known = self._gradients(anchor, tokens.k, tokens.v)
        rate, strength = tokens.rate.unsqueeze(-1), tokens.strength.unsqueeze(-1)
        layers = []
        for number, (x, slope, gives, weight) in enumerate(zip(inputs, slopes, known, W, strict=True)):
            momentum, first, shared = S[number] if S else None, number == 0, x is inputs[0]
            if not first:
                weight, gives = self._by_memory(weight), self._by_memory(gives)
                momentum = None if momentum is None else self._by_memory(momentum)
                # A second layer that reads keys, as in a SwiGLU, shares them too.
                x = x.unsqueeze(1) if shared else self._by_memory(x)
            step = -rate * self._side_by_side(slope) if first else -_each(rate) * self._by_memory(slope)
            # Keys have unit length already.
            length = None if shared else torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=SHORTEST)
            unit = x if length is None else x / length
            layer = Written(along=x, unit=unit, step=step, erased=None, W=weight, S=momentum)
            if self.network.rule.erases(number):
                # What the memories answer to their keys is known of the gradients, where those are of the same weights.
                if W[number] is not anchor[number]:
                    gives = None
                elif length is not None:
                    gives = gives / length
                layer = _erasing(
                    layer, before if first else before.each(), strength if first else _each(strength), gives
                )
            layers.append(layer)
        behind = [layer.behind(end if number == 0 else end.each()) for number, layer in enumerate(layers)]
        after = tuple(part if part.ndim == 4 else part.flatten(1, 2) for part, _ in behind)
        pushed_on = tuple(part if part.ndim == 4 else part.flatten(1, 2) for _, part in behind if part is not None)
        if read is None:
            return None, after, pushed_on
        if read == "chunk_start":
            return self.last_answers(anchor, tokens.q), after, pushed_on
        mine = [layer.of_last(self._width(W)) for layer in layers]
        return self.network.read_by(lambda number, x: mine[number].read(x, asked), tokens.q), after, pushed_on

    def _gradients(self, anchor: Layers, k: Tensor, v: Tensor) -> tuple[list[Tensor], Layers, list[Tensor]]:
        """What each layer reads of keys, the slope at its outputs and these outputs themselves: first layers' inputs
        (B, H, L, I) and outputs side by side, all else as further heads."""
        given: list[Tensor] = []

        def layer(number: int, x: Tensor) -> Tensor:
            if number == 0:
                given.append(x @ anchor[0])
                return self._apart(given[0])
            x = self._copied(x) if x.shape[1] < anchor[number].shape[1] else x
            given.append(x @ anchor[number])
            return given[-1]

        both = self.network.rule.target == "self"
        inputs, before, last = self.network.through(layer, torch.cat([k, v], 2) if both else k)
        target = self._copied(v)
        if both:
            answers = self.network.answer(torch.cat([k, v], 2), last)
            target = answers.split(k.shape[2], 2)[1]
            inputs, before, given = (
                [part.split(k.shape[2], 2)[0] for part in some] for some in (inputs, before, given)
            )
            last = last.split(k.shape[2], 2)[0]
        inputs[0] = k
        if self.network.rule.memory.kind == "swiglu":
            inputs[1] = k
        return inputs, self.network.slopes(anchor, inputs, before, last, target, None), given

    def _read(self, weights: Layers, x_BHTD: Tensor) -> Tensor:
        """The answers (B, n·H, T, D) of weights that all tokens share."""

        def layer(number: int, x: Tensor) -> Tensor:
            if number == 0:
                return self._apart(x @ weights[0])
            return (self._copied(x) if x.shape[1] < weights[number].shape[1] else x) @ weights[number]

        return self.network.read_by(layer, x_BHTD)

    def stacked(self, layers: Layers) -> Layers:
        """With the outputs of first layers side by side."""
        return (self._side_by_side(layers[0]), *layers[1:]) if layers else ()

    def unstacked(self, layers: Sequence[Tensor]) -> Layers:
        """With the memories' first layers as further heads, too."""
        return (self._apart(layers[0]), *layers[1:]) if layers else ()

    def _width(self, stacked: Layers) -> int:
        """Of one memory's outputs in a first layer."""
        return self.network.rule.widths(stacked[0].shape[2], stacked[0].shape[2])[0][1]

    def _copied(self, part_BH: Tensor) -> Tensor:
        return torch.cat([part_BH] * self.count, 1) if self.count > 1 else part_BH

    def _by_memory(self, part_BNxy: Tensor) -> Tensor:
        """(B, n·H, …) as (B, n, H, …)."""
        return part_BNxy.unflatten(1, (self.count, -1))

    def _side_by_side(self, part_BNIO: Tensor) -> Tensor:
        """(B, n·H, I, O) as (B, H, I, n·O)."""
        return part_BNIO.unflatten(1, (self.count, -1)).permute(0, 2, 3, 1, 4).flatten(3)

    def _apart(self, part_BHIO: Tensor) -> Tensor:
        """(B, H, I, n·O) as (B, n·H, I, O)."""
        return part_BHIO.unflatten(3, (self.count, -1)).permute(0, 3, 1, 2, 4).flatten(1, 2)


def _each(part_BH: Tensor) -> Tensor:
    """For every memory."""
    return part_BH.unsqueeze(1)


def _erasing(layer: Written, before: Left, strength: Tensor, known: Tensor | None) -> Written:
    """With what the tokens take off a layer along the inputs that they write along, −e_i h_i W_{i−1} (`delta`)."""
    found = layer.read(layer.unit, before, known=known)
    system = (layer.unit @ layer.unit.mT) * before.kept * strength
    erased = torch.linalg.solve_triangular(system, -strength * found, upper=False, unitriangular=True)
    return Written(along=layer.along, unit=layer.unit, step=layer.step, erased=erased, W=layer.W, S=layer.S)
