"""`AssociativeMemory`: a memory for every head that learns pairs of keys and values while it reads them.

It is given keys, values, queries and gates; where they come from is the layer's business (`mixer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clplat.architectures.associative_memory.bulk import written
from clplat.architectures.associative_memory.chunked import Mixed, chunked, one_more
from clplat.architectures.associative_memory.layout import Documents, bounds, continued, separated
from clplat.architectures.associative_memory.network import Network, featured
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import LOWEST_GATE, MemoryState, Tokens, repeated
from clplat.architectures.associative_memory.token_loop import token_loop
from clplat.kernels.delta_memory import MemoryState as MatrixState
from clplat.kernels.delta_memory import delta_memory, which_backend


class AssociativeMemory(nn.Module):
    """The memory of H heads under one rule, with the weights that it begins with.

    `first` (H, I, O) of every layer are trained by the outer loss, through all inner steps; without
    `learned_start`, which only a matrix memory may do, it begins from zero. Training, prefill and decoding are
    one computation: nothing asks for `training` or for autograd.
    """

    def __init__(
        self, *, rule: MemoryRule, num_heads: int, key_size: int, value_size: int, learned_start: bool = True
    ) -> None:
        super().__init__()
        if rule.memory.depth > 1 and not learned_start:
            raise ValueError("learned_start: an MLP that begins from zero has no gradient; only memory.depth 1 may")
        if (rule.memory.residual or rule.target == "self") and key_size != value_size:
            asked = "memory.residual" if rule.memory.residual else "target 'self'"
            raise ValueError(f"{asked}: needs keys as wide as values, got {key_size} and {value_size}")
        self.rule, self.num_heads, self.value_size = rule, num_heads, value_size
        self.shapes = [(num_heads, *widths) for widths in rule.widths(key_size, value_size)]
        kept = self.shapes if learned_start else []
        self.first = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in kept)
        self.scale = nn.Parameter(torch.empty(num_heads, 1, value_size)) if rule.memory.norm else None
        self.shift = nn.Parameter(torch.empty(num_heads, 1, value_size)) if rule.memory.norm else None
        self.register_buffer("nothing", torch.zeros(()), persistent=False)
        self.nothing: Tensor
        self.writes = True
        """False: step sizes are 0 and nothing is forgotten, for a reading without memory."""
        self.backend = "none yet"
        """What computed the last call, for the record."""
        self.reset_start()

    @torch.no_grad()
    def reset_start(self) -> None:
        """A matrix begins near zero; the layers of an MLP such that they keep the scale of what they read, and a matrix
        under a norm too: the norm's slope grows as what it divides by shrinks."""
        near_zero = self.rule.memory.depth == 1 and not self.rule.memory.norm
        for weight in self.first:
            nn.init.normal_(weight, std=0.02 if near_zero else 1 / math.sqrt(weight.shape[1]))
        if self.scale is not None and self.shift is not None:
            nn.init.ones_(self.scale)
            nn.init.zeros_(self.shift)

    def empty_state(self, rows: int) -> MemoryState:
        """The memory before any token, in float32 or wider."""
        first = list(self.first) or [self.nothing.expand(shape) for shape in self.shapes]
        weights = tuple(part.to(self._wide()).expand(rows, *part.shape) for part in first)
        momentum = tuple(map(torch.zeros_like, weights)) if self.rule.optimizer == "momentum" else ()
        offset = torch.zeros(rows, dtype=torch.long, device=self.nothing.device)
        return MemoryState(weights, momentum, weights if self.rule.anchored else (), offset)

    def forward(self, tokens: Tokens, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Answers (B, H, T, E) in v's precision or float32, and the state behind the last token.

        `tokens` as `state.py` describes them, of any precision; `state` continues an earlier call, at any token.
        Raises ValueError where a gate is missing or not wanted.
        """
        tokens = self._checked(tokens)
        fresh = state is None
        state = self.empty_state(len(tokens.q)) if state is None else state
        with torch.autocast(tokens.q.device.type, enabled=False):
            form = self._kernel(tokens, even=fresh or not self.rule.anchored)
            self.backend = "chunked PyTorch" if form is None else f"delta_memory {form}"
            if form is not None:
                given = state._replace(anchor=()) if fresh else state
                o, end = delta_memory(**_by_name(tokens), **self._mode(), state=_matrix_state(given))
                return o.transpose(1, 2), self._own_state(end, state)
            return self._by_chunks(_prepared(tokens, self._wide()), state, fresh)

    def read_documents(self, tokens: Tokens, documents: Documents, first: MemoryState | None = None) -> Tensor:
        """Answers (B, H, T, E) to packed rows, where each document begins with the first state, or `first` of one row,
        and a chunk."""
        tokens = self._checked(tokens)
        first = self.empty_state(1) if first is None else first
        rows, length = tokens.q.shape[0], tokens.q.shape[2]
        with torch.autocast(tokens.q.device.type, enabled=False):
            form = self._kernel(tokens, even=False)
            self.backend = "chunked PyTorch" if form is None else f"delta_memory {form}"
            if form is not None:
                state = _matrix_state(repeated(first, len(documents.starts))._replace(anchor=()))
                named = {name: part.flatten(0, 1).unsqueeze(0) for name, part in _by_name(tokens).items()}
                ends = bounds(documents, tokens.q.device)
                o, _ = delta_memory(**named, **self._mode(), state=state, cu_seqlens=ends)
                return o.squeeze(0).unflatten(0, (rows, length)).transpose(1, 2)
            layout = separated(documents, rows, length, self.rule.chunk)
            moved = _prepared(tokens, self._wide()).taken(layout.source_BN)
            return layout.back(chunked(self._network(), moved, repeated(first, rows), layout.begins_Bn)[0])

    def prepared(self, tokens: Tokens) -> Tokens:
        """As `aligned` takes them: queries and keys through the feature map, all in the state's precision."""
        return _prepared(self._checked(tokens), self._wide())

    def aligned(
        self, tokens: Tokens, state: MemoryState, mixed: Mixed | None = None, place_B: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Answers to `prepared` tokens of which chunks lie at multiples of `chunk` from the first, in PyTorch; rows of
        which a chunk is open have places for its first tokens that do not count, and begin at `place_B` if not in the
        first chunk (`chunked.py`)."""
        self.backend = "chunked PyTorch"
        with torch.autocast(tokens.q.device.type, enabled=False):
            return chunked(self._network(), tokens, state, mixed=mixed, place_B=place_B)

    def written(self, tokens: Tokens, state: MemoryState) -> MemoryState:
        """The state behind `prepared` tokens that lie within one chunk, where their answers are not asked for."""
        if self.rule.gradient_at != "chunk":
            return self.aligned(tokens, state)[1]
        self.backend = "chunked PyTorch"
        with torch.autocast(tokens.q.device.type, enabled=False):
            return written(self._network(), tokens, state)

    def read(self, weights: Sequence[Tensor], q_BHTD: Tensor) -> Tensor:
        """The answers of given weights, of the same leading dimensions, to `prepared` queries."""
        with torch.autocast(q_BHTD.device.type, enabled=False):
            return self._network().read(weights, q_BHTD)

    def by_definition(
        self, tokens: Tokens, state: MemoryState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryState]:
        """The same by the loop over tokens, for tests."""
        state = self.empty_state(len(tokens.q)) if state is None else state
        tokens = self._checked(tokens)
        begins = None if documents is None else documents.begins()
        return token_loop(self._network(), _prepared(tokens, self._wide()), state, begins)

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.nothing.dtype, torch.float32)

    def _network(self) -> Network:
        scale, shift = (None if part is None else part.to(self._wide()) for part in (self.scale, self.shift))
        return Network(rule=self.rule, scale=scale, shift=shift)

    def _checked(self, tokens: Tokens) -> Tokens:
        """The tokens with the feature map of queries and keys, if their gates are those of the rule."""
        rule = self.rule
        wanted = {
            "log_decay": (rule.retention != "none", bool(tokens.log_decay)),
            "log_momentum": (rule.optimizer == "momentum", tokens.log_momentum is not None),
            "threshold": (rule.bias.kind == "huber", tokens.threshold is not None),
        }
        for name, (asked, given) in wanted.items():
            if asked != given:
                raise ValueError(f"{name}: the memory's rule {'needs' if asked else 'has no use for'} it")
        if not self.writes:
            still = tuple(map(torch.zeros_like, tokens.log_decay))
            tokens = tokens._replace(rate=torch.zeros_like(tokens.rate), log_decay=still)
        return tokens._replace(q=featured(tokens.q, rule.feature), k=featured(tokens.k, rule.feature))

    def _by_chunks(self, tokens: Tokens, state: MemoryState, fresh: bool) -> tuple[Tensor, MemoryState]:
        network, length = self._network(), tokens.q.shape[2]
        if fresh or not self.rule.anchored:
            return chunked(network, tokens, state)
        if length == 1:
            return one_more(network, tokens, state)
        layout = continued(state.offset, length, self.rule.chunk)
        answers, end = chunked(network, tokens.taken(layout.source_BN), state)
        return layout.back(answers), end

    def _kernel(self, tokens: Tokens, *, even: bool) -> str | None:
        """The form in which `delta_memory` takes this call; None where it has no such rule."""
        rule = self.rule
        matrix = rule.memory.depth == 1 and not rule.memory.norm and not rule.memory.residual
        known = matrix and rule.target == "value" and rule.bias.kind in ("dot", "l2") and rule.retention != "channel"
        if not known or tokens.counts is not None:
            return None
        q, k, v = (part.transpose(1, 2) for part in tokens[:3])
        form = which_backend(q, k, v, chunk=rule.chunk)
        # Its PyTorch form takes rows one by one where their chunks or documents lie differently.
        return None if form == "torch" and not even else form

    def _mode(self) -> dict[str, Any]:
        modes = {"chunk": "frozen", "token": "exact", "decayed": "gdn"}
        return {"mode": "hebb" if self.rule.hebbian else modes[self.rule.gradient_at], "chunk": self.rule.chunk}

    def _own_state(self, end: MatrixState, before: MemoryState) -> MemoryState:
        momentum = () if end.S is None else (end.S,)
        if not self.rule.anchored:
            return MemoryState((end.W,), momentum, (), before.offset)
        offset = torch.zeros_like(before.offset) if end.offset is None else end.offset.long()
        return MemoryState((end.W,), momentum, (end.W if end.anchor is None else end.anchor,), offset)


def _by_name(tokens: Tokens) -> dict[str, Tensor]:
    """The arguments of `delta_memory`, tokens before heads."""
    parts = {"q": tokens.q, "k": tokens.k, "v": tokens.v, "rate": tokens.rate, "log_momentum": tokens.log_momentum}
    parts["log_decay"] = tokens.log_decay[0].squeeze(-1) if tokens.log_decay else None
    return {name: part.transpose(1, 2) for name, part in parts.items() if part is not None}


def _matrix_state(state: MemoryState) -> MatrixState:
    anchor, offset = (state.anchor[0], state.offset.int()) if state.anchor else (None, None)
    return MatrixState(state.weights[0], state.momentum[0] if state.momentum else None, anchor, offset)


def _prepared(tokens: Tokens, wide: torch.dtype) -> Tokens:
    """All in the state's precision, with gates no lower than they may be."""
    q, k, v, rate, log_decay, log_momentum, threshold, counts = tokens
    return Tokens(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        rate.to(wide),
        tuple(gate.to(wide).clamp(min=LOWEST_GATE) for gate in log_decay),
        None if log_momentum is None else log_momentum.to(wide).clamp(min=LOWEST_GATE),
        None if threshold is None else threshold.to(wide),
        counts,
    )
