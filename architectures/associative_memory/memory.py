"""`AssociativeMemory`: a memory for every head that learns pairs of keys and values while it reads them.

It is given keys, values, queries and gates; where they come from is the layer's business (`mixer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clplat.architectures.associative_memory.bulk import takes, written
from clplat.architectures.associative_memory.chunked import Mixed, chunked, one_more
from clplat.architectures.associative_memory.features import FeatureMap
from clplat.architectures.associative_memory.layout import Documents, bounds, continued, separated
from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.omega_window import empty_window
from clplat.architectures.associative_memory.operations import by_name, operation_for
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import LOWEST_GATE, Layers, MemoryState, Tokens, repeated
from clplat.architectures.associative_memory.token_loop import token_loop


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
        if rule.map.kind == "norm" and not learned_start:
            raise ValueError("learned_start: weights that begin from zero have no norm to keep; map.kind norm needs it")
        width = rule.feature_width(key_size)
        if (rule.memory.residual or rule.target == "self") and width != value_size:
            asked = "memory.residual" if rule.memory.residual else "target 'self'"
            raise ValueError(f"{asked}: needs keys as wide as values, got {width} and {value_size}")
        self.rule, self.num_heads, self.value_size = rule, num_heads, value_size
        self.shapes = [(num_heads, *widths) for widths in rule.widths(key_size, value_size)]
        self.features = FeatureMap(rule=rule, num_heads=num_heads, key_size=key_size)
        kept = self.shapes if learned_start else []
        self.first = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in kept)
        self.scale = nn.Parameter(torch.empty(num_heads, 1, value_size)) if rule.memory.norm else None
        self.shift = nn.Parameter(torch.empty(num_heads, 1, value_size)) if rule.memory.norm else None
        self.register_buffer("nothing", torch.zeros(()), persistent=False)
        self.nothing: Tensor
        self.operation = operation_for(rule)
        self.writes = True
        """False: step sizes are 0 and nothing is forgotten, for a reading without memory."""
        self.backend = "none yet"
        """What computed the last call, for the record."""
        self.reset_start()

    @torch.no_grad()
    def reset_start(self) -> None:
        """A matrix begins near zero, an MLP with layers that keep the scale of what they read and a last one of zeros:
        what a random one would answer to every key drowns the little that a chunk writes. Under a norm, whose slope
        grows as what it divides by shrinks, or a map all layers keep the scale. Features: see `features.py`."""
        self.features.reset()
        answers_nothing = not self.rule.memory.norm and not self.rule.mapped
        for weight in self.first:
            std = 0.02 if self.rule.memory.depth == 1 and not self.rule.memory.norm else 1 / math.sqrt(weight.shape[1])
            # Weights are some root of I times smaller than their logarithms, the slices' mass over I.
            nn.init.normal_(weight, std=std * math.sqrt(weight.shape[1]) if self.rule.map.kind == "kl" else std)
        if answers_nothing and len(self.first) > 1:
            nn.init.zeros_(self.first[-1])
        if self.scale is not None and self.shift is not None:
            nn.init.ones_(self.scale)
            nn.init.zeros_(self.shift)

    def empty_state(self, rows: int) -> MemoryState:
        """The memory before any token, in float32 or wider."""
        first = list(self.first) or [self.nothing.expand(shape) for shape in self.shapes]
        weights = tuple(part.to(self._wide()).expand(rows, *part.shape) for part in first)
        momentum = tuple(map(torch.zeros_like, weights)) if self.rule.momentous else ()
        offset = torch.zeros(rows, dtype=torch.long, device=self.nothing.device)
        anchor = weights if self.rule.anchored else ()
        return MemoryState(weights, momentum, anchor, offset, self._empty_window(rows), self._nothing_owed(rows))

    def forward(self, tokens: Tokens, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Answers (B, H, T, E) in v's precision or float32, and the state behind the last token.

        `tokens` as `state.py` describes them, of any precision; `state` continues an earlier call, at any token.
        Raises ValueError where a gate is missing or not wanted.
        """
        tokens = self._checked(tokens)
        fresh = state is None
        state = self.empty_state(len(tokens.q)) if state is None else state
        with torch.autocast(tokens.q.device.type, enabled=False):
            if self._taken(tokens, even=fresh or not self.rule.anchored):
                assert self.operation is not None
                o, end = self.operation(by_name(tokens), state._replace(anchor=()) if fresh else state)
                return o.transpose(1, 2), end
            return self._by_chunks(_prepared(tokens, self._wide()), state, fresh)

    def read_documents(self, tokens: Tokens, documents: Documents, first: MemoryState | None = None) -> Tensor:
        """Answers (B, H, T, E) to packed rows, where each document begins with the first state, or `first` of one row,
        and a chunk."""
        tokens = self._checked(tokens)
        first = self.empty_state(1) if first is None else first
        rows, length = tokens.q.shape[0], tokens.q.shape[2]
        with torch.autocast(tokens.q.device.type, enabled=False):
            if self._taken(tokens, even=False):
                assert self.operation is not None
                state = repeated(first, len(documents.starts))._replace(anchor=())
                named = {name: part.flatten(0, 1).unsqueeze(0) for name, part in by_name(tokens).items()}
                o, _ = self.operation(named, state, bounds(documents, tokens.q.device))
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
        first chunk (`chunked.py`). A single token has no places before it: `state` says whether it ends its chunk."""
        self.backend = "chunked PyTorch"
        with torch.autocast(tokens.q.device.type, enabled=False):
            if tokens.q.shape[2] == 1 and self.rule.anchored:
                return one_more(self._network(), tokens, state, mixed)
            return chunked(self._network(), tokens, state, mixed=mixed, place_B=place_B)

    def written(self, tokens: Tokens, state: MemoryState) -> MemoryState:
        """The state behind `prepared` tokens that lie within one chunk, where their answers are not asked for: a whole
        chunk, in which tokens that came before have places, or one token."""
        if not takes(self.rule) and (tokens.q.shape[2] > 1 or not self.rule.anchored):
            return self.aligned(tokens, state)[1]
        self.backend = "chunked PyTorch"
        with torch.autocast(tokens.q.device.type, enabled=False):
            return (written if takes(self.rule) else _behind_one)(self._network(), tokens, state)

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

    def _empty_window(self, rows: int) -> Layers:
        if self.rule.window == 1:
            return ()
        widths = (self.shapes[0][1], self.value_size, *((1,) if self.rule.bias.kind == "huber" else ()))
        return empty_window(rows, self.num_heads, widths, self.rule.window - 1, self.nothing.to(self._wide()))

    def _nothing_owed(self, rows: int) -> Layers:
        if not self.rule.orthogonal:
            return ()
        channels = [inputs if self.rule.retention == "channel" else 1 for _, inputs, _ in self.shapes]
        like = self.nothing.to(self._wide())
        return tuple(like.new_zeros(rows, self.num_heads, count, 1) for count in channels)

    def _network(self) -> Network:
        scale, shift = (None if part is None else part.to(self._wide()) for part in (self.scale, self.shift))
        norms = self.rule.map.norms(tuple(part.to(self._wide()) for part in self.first))
        return Network(rule=self.rule, scale=scale, shift=shift, norms=norms)

    def _checked(self, tokens: Tokens) -> Tokens:
        """The tokens with the feature map of queries and keys, if their gates are those of the rule."""
        rule = self.rule
        wanted = {
            "log_decay": (rule.retention != "none", bool(tokens.log_decay)),
            "log_momentum": (rule.momentous, tokens.log_momentum is not None),
            "threshold": (rule.bias.kind == "huber", tokens.threshold is not None),
            "window": (rule.window > 1, tokens.window is not None),
        }
        for name, (asked, given) in wanted.items():
            if asked != given:
                raise ValueError(f"{name}: the memory's rule {'needs' if asked else 'has no use for'} it")
        if tokens.window is not None and tokens.window.shape[-1] != rule.window:
            raise ValueError(f"window: must weigh {rule.window} pairs, got {tokens.window.shape[-1]}")
        tokens = tokens if self.writes else tokens.resting()
        q, k, v = self.features(tokens.q), self.features(tokens.k), tokens.v
        if self.operation is not None:
            # Autocast norms in float32 on a GPU; operations take queries, keys and values of one type.
            q, k, v = (part.to(tokens.q.dtype) for part in (q, k, v))
        return tokens._replace(q=q, k=k, v=v)

    def _by_chunks(self, tokens: Tokens, state: MemoryState, fresh: bool) -> tuple[Tensor, MemoryState]:
        network, length = self._network(), tokens.q.shape[2]
        if fresh or not self.rule.anchored:
            return chunked(network, tokens, state)
        if length == 1:
            return one_more(network, tokens, state)
        layout = continued(state.offset, length, self.rule.chunk)
        answers, end = chunked(network, tokens.taken(layout.source_BN), state)
        return layout.back(answers), end

    def _taken(self, tokens: Tokens, *, even: bool) -> bool:
        """Whether the rule's operation takes this call, which goes into the record."""
        known = self.operation is not None and tokens.counts is None and tokens.erase is None
        form = self.operation.form(tokens) if known and self.operation is not None else None
        # Its PyTorch form takes rows one by one where their chunks or documents lie differently.
        taken = form is not None and (even or form != "torch")
        self.backend = f"{self.operation.name} {form}" if self.operation is not None and taken else "chunked PyTorch"
        return taken


def _behind_one(network: Network, token: Tokens, state: MemoryState) -> MemoryState:
    return one_more(network, token, state)[1]


def _prepared(tokens: Tokens, wide: torch.dtype) -> Tokens:
    """All in the state's precision, with gates no lower than they may be."""
    q, k, v, rate, log_decay, log_momentum, threshold, counts, erase, window = tokens
    return Tokens(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        rate.to(wide),
        tuple(gate.to(wide).clamp(min=LOWEST_GATE) for gate in log_decay),
        None if log_momentum is None else log_momentum.to(wide).clamp(min=LOWEST_GATE),
        None if threshold is None else threshold.to(wide),
        counts,
        None if erase is None else erase.to(wide),
        None if window is None else window.to(wide),
    )
