"""Memories of one head that learn under one key, one step size and one decay: written together, a chunk at once.

Their first layers read the same keys, so they are one matrix with the outputs side by side: one triangular system
erases in all of them. Layers behind the first read what their own memory made and are treated as further heads.

Shapes as in `associative_memory/state.py`, with n memories of H heads as heads n·H, memory after memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.spans import (
    Spans,
    Write,
    erasure,
    layer_left,
    layer_pushed,
    layer_read,
    layer_spans,
)
from clplat.architectures.associative_memory.spans import one_token_earlier as earlier
from clplat.architectures.associative_memory.state import Layers, Tokens
from clplat.architectures.hope.options import Read


@dataclass(frozen=True, kw_only=True)
class Bank:
    """`count` memories a head; weights are passed in."""

    network: Network
    count: int

    def answers(self, weights: Layers, x_BHTD: Tensor) -> tuple[Tensor, ...]:
        """What each memory gives to x, (B, H, T, D) of each, by weights that all tokens share."""
        read = self.network.read(weights, self._copied(x_BHTD))
        return read.unflatten(1, (self.count, -1)).unbind(1)

    def copied(self, tokens: Tokens) -> Tokens:
        """The tokens for each memory, as further heads."""
        return tokens._replace(
            q=self._copied(tokens.q), k=self._copied(tokens.k), v=self._copied(tokens.v),
            rate=self._copied(tokens.rate), log_decay=tuple(self._copied(gate) for gate in tokens.log_decay),
            log_momentum=None if tokens.log_momentum is None else self._copied(tokens.log_momentum),
            erase=None if tokens.erase is None else self._copied(tokens.erase),
        )  # fmt: skip

    def written(
        self, tokens: Tokens, W: Layers, S: Layers, anchor: Layers, read: Read | None
    ) -> tuple[Tensor | None, Layers, Layers]:
        """One chunk, or a part of it, of L tokens of H heads, with gradients at `anchor`: what the last memory answers
        to the queries, (B, H, L, D), None where nobody asks, and weights and momentum of all behind the tokens."""
        inputs, slopes = self.network.gradients(anchor, self._copied(tokens.k), self._copied(tokens.v), None)
        steps = [-self._copied(tokens.rate).unsqueeze(-1) * slope for slope in slopes]
        own = layer_spans(tokens, 0)
        spans = [own] + [self._spans(own)] * (len(W) - 1)
        strengths = [tokens.strength] + [self._copied(tokens.strength)] * (len(W) - 1)
        along = [tokens.k, *inputs[1:]]
        steps[0], W, S = self._side_by_side(steps[0]), self._stacked(W), self._stacked(S)
        writes = [[Write(x, step, span.writes)] for x, step, span in zip(along, steps, spans, strict=True)]
        for layer, span in enumerate(spans):
            if self.network.rule.erases(layer):
                write = erasure(span, writes[layer][0], strengths[layer], W[layer], S[layer] if S else None)
                writes[layer].append(write)
        layers = list(zip(spans, writes, W, strict=True))
        behind = (
            tuple(layer_left(*parts, S[n] if S else None) for n, parts in enumerate(layers)),
            tuple(layer_pushed(span, write[0], part) for span, write, part in zip(spans, writes, S)),
        )
        answers = None
        if read == "chunk_start":
            answers = self.network.read(tuple(part[:, -tokens.q.shape[1] :] for part in anchor), tokens.q)
        elif read is not None:
            answers = self._answered(tokens.q, spans, writes, W, S, before=read == "before")
        return answers, self._unstacked(behind[0]), self._unstacked(behind[1])

    def _answered(
        self, q_BHLD: Tensor, spans: list[Spans], writes: list[list[Write]], W: Layers, S: Layers, before: bool
    ) -> Tensor:
        """Queries, by the last memory as it is before or behind each token's write."""
        heads, width = q_BHLD.shape[1], W[0].shape[-1] // self.count

        def applied(layer: int, x: Tensor) -> Tensor:
            columns, rows = (slice(-width, None), slice(None)) if layer == 0 else (slice(None), slice(-heads, None))
            own = Spans(*(None if part is None else part[:, rows] for part in spans[layer]))  # type: ignore[arg-type]
            own = earlier(own) if before else own
            mine = [
                Write(write.along[:, rows], write.step[:, rows, :, columns], left)
                for write, left in zip(writes[layer], (own.writes, own.kept))
            ]
            momentum = S[layer][:, rows, :, columns] if S else None
            return layer_read(own, mine, x, W[layer][:, rows, :, columns], momentum)

        return self.network.read_by(applied, q_BHLD)

    def _copied(self, part_BH: Tensor) -> Tensor:
        return torch.cat([part_BH] * self.count, 1) if self.count > 1 else part_BH

    def _spans(self, span: Spans) -> Spans:
        return Spans(*(None if part is None else self._copied(part) for part in span))  # type: ignore[arg-type]

    def _side_by_side(self, part_BnHIO: Tensor) -> Tensor:
        """(B, n·H, I, O) as (B, H, I, n·O)."""
        return part_BnHIO.unflatten(1, (self.count, -1)).permute(0, 2, 3, 1, 4).flatten(3)

    def _stacked(self, layers: Layers) -> Layers:
        return (self._side_by_side(layers[0]), *layers[1:]) if layers else ()

    def _unstacked(self, layers: Layers) -> Layers:
        if not layers:
            return ()
        return (layers[0].unflatten(3, (self.count, -1)).permute(0, 3, 1, 2, 4).flatten(1, 2), *layers[1:])
