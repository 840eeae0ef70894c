"""TNT: one memory of long chunks for the whole row, and memories of short chunks that begin anew in every shard.

With V the global memory, of chunk C_G, and W^(j) the local ones, of chunk C_j, set back to their learned start every
`shard` tokens (TNT, arXiv:2511.07343; known to us from summaries of its equations):

    o_t = V at its chunk's start (q_t) + Σ_j W_t^(j)(P_t q_t)
    P_t = Σ_τ k_τ k_τᵀ / ‖k_τ‖², τ from the start of W^(j)'s chunk to t

Shards do not depend on each other, so that they are rows of one batch: a row of T tokens takes T / C_G steps of the
global memory and shard / C_j of a local one, in place of T / C_j. P_t sums up to t: the sum of the whole chunk would
tell of the future. Shapes: see `state.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.caching import check_weights
from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.mixer import MemoryMixer
from clplat.architectures.associative_memory.presets import LayerKind, MemoryLayer, TitansLMM
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.segments import Segments, counted, cut, folded, run
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen, either
from clplat.architectures.associative_memory.telemetry import Written


class TNTState(NamedTuple):
    """All memories of a layer; give it back to go on at any token."""

    wide: tuple[Any, ...]
    """The global `MemoryState`."""
    start: Layers
    """Its weights when the open chunk began, which are read."""
    near: tuple[tuple[Any, ...], ...]
    """The local ones."""
    seen: tuple[Tensor, ...]
    """(B, H, D, D) for each of them: P of its open chunk."""
    position: Tensor
    """(B,) tokens read."""


class TNTMixer(MemoryMixer):
    """A layer of one global and several local memories, which share queries, keys, values and gates.

    `memory` is the global one. Step sizes of a memory go up to `max_rate`, or to 1 / its own chunk.
    """

    def __init__(
        self, *, hidden_size: int, layer: MemoryLayer, global_chunk: int, stages: Mapping[int, Sequence[int]],
        shard: int, project: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_size=hidden_size, num_heads=layer.num_heads, rule=_with_chunk(layer.rule, global_chunk),
            projection=layer.projection,
        )  # fmt: skip
        self.global_chunk, self.shard, self.project, self.stages = global_chunk, shard, project, stages
        self.local_rule, self.task = layer.rule, 0
        self.near = nn.ModuleList(
            AssociativeMemory(
                rule=_with_chunk(layer.rule, chunk), num_heads=layer.num_heads, key_size=self.head_size,
                value_size=self.memory.value_size, learned_start=layer.projection.learned_start,
            )
            for chunk in stages[0]
        )  # fmt: skip
        self.enter(0)

    def enter(self, task: int) -> None:
        """Chunks of the local memories become those of the task's stage; no weight depends on them."""
        self.task = task
        self.chunks = list(self.stages[max(first for first in self.stages if first <= task)])
        for memory, chunk in zip(self._near(), self.chunks, strict=True):
            memory.rule = _with_chunk(self.local_rule, chunk)

    def reset_dynamics(self) -> None:
        """Local memories begin as the global one does."""
        super().reset_dynamics()
        if hasattr(self, "near"):
            for memory in self._near():
                memory.reset_start()

    def written(self, x_BTC: Tensor) -> dict[str, Written]:
        """What the global memory and each local one do with a row (1, T, C), local ones in every shard anew."""
        found = super().written(x_BTC)
        segments = cut(x_BTC, self.shard, None, None, chunk=math.lcm(*self.chunks))
        placed = segments.placed(self.memory.prepared(self._tokens(x_BTC, self.qkv(x_BTC), None, None)))
        for number, local in enumerate(self._near()):
            own, backend = placed._replace(rate=placed.rate * self._faster(local.rule)), local.backend
            ends = run(local, own, segments, None, warm=False).ends.weights
            local.backend = backend
            first = local.empty_state(segments.touched).weights
            end = tuple(part.flatten(0, 1) for part in ends)
            found[f"local{number}"] = Written(local, (folded(own, segments),), first, end)
        return found

    def mixing_flops(self, tokens: int) -> float:
        """As of a layer for each memory, without products inside of the global one's chunks."""
        rule = self.rule
        inside = sum(heads * 2.0 * (wide + out) for heads, wide, out in self.memory.shapes)
        inside += 2.0 * self.num_heads * rule.chunk * (rule.optimizer == "momentum")
        total = super().mixing_flops(tokens) - tokens * rule.chunk * inside
        for memory, chunk in zip(self._near(), self.chunks):
            total += self.flops_under(memory.rule, tokens)
            total += 4.0 * tokens * chunk * self.num_heads * self.head_size * self.project
        return total

    def _near(self) -> list[AssociativeMemory]:
        return [memory for memory in self.near if isinstance(memory, AssociativeMemory)]

    def _empty_memory(self, batch_size: int) -> tuple[Any, ...]:
        wide, near = self.memory.empty_state(batch_size), [m.empty_state(batch_size) for m in self._near()]
        nothing = wide.weights[0].new_zeros(batch_size, self.num_heads, self.head_size, self.head_size)
        seen = (nothing,) * len(near)
        return tuple(TNTState(tuple(wide), wide.weights, tuple(map(tuple, near)), seen, torch.zeros_like(wide.offset)))

    def _remembered(
        self, x_BTC: Tensor, tokens: Tokens, memory: tuple[Any, ...] | None, documents: Documents | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        before = None if memory is None else TNTState(*memory)
        position, prepared = None if before is None else before.position, self.memory.prepared(tokens)
        segments = cut(x_BTC, self.global_chunk, position, documents, chunk=1)
        answers, wide, start = self._wide_read(segments.placed(prepared), segments, before)
        answers, near, seen = segments.back(answers), [], []
        segments = cut(x_BTC, self.shard, position, documents, chunk=math.lcm(*self.chunks))
        placed = segments.placed(prepared)
        for number, (local, chunk) in enumerate(zip(self._near(), self.chunks)):
            own, prefix = placed, None if before is None else before.seen[number]
            if self.project:
                own = placed._replace(q=projected(placed, segments, chunk, prefix))
            own = own._replace(rate=own.rate * self._faster(local.rule))
            state = None if before is None else MemoryState(*before.near[number])
            read = run(local, own, segments, state, warm=False)
            answers = answers + segments.back(read.answers_BHPE)
            near.append(tuple(read.state))
            if prefix is not None:
                seen.append(prefix_after(placed, segments, chunk, prefix))
        if before is None:
            return answers, ()
        read_so_far = before.position + counted(placed)
        return answers, tuple(TNTState(tuple(wide), start, tuple(near), tuple(seen), read_so_far))

    def _faster(self, rule: MemoryRule) -> float:
        """How many times a local memory's steps may be as large as the global one's."""
        if self.options.max_rate is not None or not rule.steps_together or rule.delta != "none":
            return 1.0
        return self.rule.chunk / rule.chunk

    def _wide_read(
        self, tokens: Tokens, segments: Segments, before: TNTState | None
    ) -> tuple[Tensor, MemoryState, Layers]:
        """Answers of the global memory, its state behind the tokens, and the weights that are read there."""
        first = self.memory.empty_state(len(tokens.q))
        state = first if before is None else MemoryState(*before.wide)
        start = first.weights if before is None else before.start
        begins, answers = segments.number_Bn == segments.first_Bn, []
        for number in range(segments.touched):
            part = tokens.part(number * segments.width, (number + 1) * segments.width)
            if number:
                state = either(begins[:, number], first, state)
                reached = None if before is None else segments.reaches(number, counted(tokens))
                start = state.weights if reached is None else chosen(reached, state.weights, start)
            answers.append(self.memory.read(start, part.q))
            state = self.memory.written(part, state)
        full = segments.after(counted(tokens))[0] == 0
        return torch.cat(answers, 2), state, chosen(full.expand(len(first.offset)), state.weights, start)


def projected(tokens: Tokens, segments: Segments, chunk: int, prefix_BHDD: Tensor | None) -> Tensor:
    """P_t q_t (B, H, P, D) of tokens in their places; `prefix_BHDD` is P of the chunk that is open before them."""
    keys = _directions(tokens)
    size = min(chunk, segments.width)
    q, k = (part.unflatten(2, (-1, size)) for part in (tokens.q, keys))
    with torch.autocast(q.device.type, enabled=False):
        found = ((q @ k.mT).tril() @ k).flatten(2, 3)
        if prefix_BHDD is None:
            return found
        return found + (tokens.q @ prefix_BHDD) * _in_chunk(segments, chunk, segments.offset_B)[:, None, :, None]


def prefix_after(tokens: Tokens, segments: Segments, chunk: int, prefix_BHDD: Tensor) -> Tensor:
    """P of the chunk that is open behind the tokens, 0 where none is."""
    keys, end = _directions(tokens), segments.offset_B + counted(tokens)
    own = keys * _in_chunk(segments, chunk, end)[:, None, :, None]
    same = (segments.offset_B // chunk == end // chunk)[:, None, None, None]
    with torch.autocast(keys.device.type, enabled=False):
        return torch.where(same, prefix_BHDD, 0.0) + own.mT @ keys


def _directions(tokens: Tokens) -> Tensor:
    """Keys of length 1, 0 for tokens that do not count."""
    keys = F.normalize(tokens.k, dim=-1)
    return keys if tokens.counts is None else keys.masked_fill(~tokens.counts[:, None, :, None], 0.0)


def _in_chunk(segments: Segments, chunk: int, place_B: Tensor) -> Tensor:
    """(B, P) bool, the places of the chunk in which `place_B`, counted from the open segment's start, lies."""
    columns = torch.arange(segments.touched * segments.width, device=place_B.device)
    if segments.width == 1:
        return (segments.offset_B // chunk == place_B // chunk).unsqueeze(1)
    return columns // chunk == (place_B // chunk).unsqueeze(1)


def _with_chunk(rule: MemoryRule, chunk: int) -> MemoryRule:
    """The rule with that chunk, where chunks are part of the function."""
    return dataclasses.replace(rule, chunk=chunk) if rule.anchored else rule


class TNT(LayerKind):
    """A global memory of long chunks and local ones of short chunks that begin anew in every shard."""

    paper = "TNT, arXiv:2511.07343"

    def __init__(
        self, *, layer: MemoryLayer | None = None, global_chunk: int = 2048, local_chunks: Sequence[int] = (8,),
        shard: int = 2048, project: bool = True, later: Mapping[int, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        """`layer` (TitansLMM) says what each memory is; its chunk is not used where chunks are part of the function.
        `local_chunks`: one local memory for each. `shard` tokens until they begin anew. `project`: queries of local
        memories are projected on the keys of their chunk. `later`: by the index of a task the local chunks from its
        start on, for the paper's second stage, {1: [1]} for a stream whose second task is the short last part of
        training."""
        self.layer = TitansLMM() if layer is None else layer
        self.global_chunk, self.shard, self.project = global_chunk, shard, project
        self.stages = {0: list(local_chunks)} | {int(task): list(chunks) for task, chunks in (later or {}).items()}
        check_weights("TNT", self.layer)
        if self.layer.rule.feature in ("poly", "taylor"):
            raise ValueError(
                f"TNT.layer: feature {self.layer.rule.feature} learns, and memories share queries and keys"
            )
        for name, value in (("global_chunk", global_chunk), ("shard", shard)):
            if value < 1:
                raise ValueError(f"TNT.{name}: must be at least 1, got {value}")
        if not local_chunks:
            raise ValueError("TNT.local_chunks: must name the chunk of at least one local memory")
        if later and min(map(int, later)) < 1:
            raise ValueError(f"TNT.later: is of tasks from 1 on, got {min(later)}; chunks of task 0 are local_chunks")
        for task, chunks in self.stages.items():
            self._check_stage("local_chunks" if not task else f"later.{task}", chunks)

    def build(self, hidden_size: int) -> TNTMixer:
        """The layer; ValueError where heads do not divide the stream."""
        self.layer.build(hidden_size)
        return TNTMixer(
            hidden_size=hidden_size, layer=self.layer, global_chunk=self.global_chunk, stages=self.stages,
            shard=self.shard, project=self.project,
        )  # fmt: skip

    def _check_stage(self, name: str, chunks: Sequence[int]) -> None:
        if len(chunks) != len(self.stages[0]):
            raise ValueError(f"TNT.{name}: must give {len(self.stages[0])} chunks, as local_chunks, got {chunks}")
        for chunk in chunks:
            if chunk < 1 or self.shard % chunk:
                raise ValueError(f"TNT.{name}: {chunk} must divide shard ({self.shard})")
