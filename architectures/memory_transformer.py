"""A decoder whose layers are test-time memories and attention, in the order of a list.

    class_path: MemoryTransformer
    init_args:
      hidden_size: 256
      layers: [TitansLMM, {class_path: AttentionLayer, init_args: {num_heads: 8}}]
      repeat: 2

The kinds of layers: `associative_memory/presets.py`, `hope/presets.py`; sources and what is inferred: docs/memories.md.

Shapes: B rows, T tokens, S tokens in an attention layer's cache, C hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clplat.architectures.associative_memory import lact, miras, titans_presets, tnt  # noqa: F401
from clplat.architectures.associative_memory.carrying import CarryingMixer
from clplat.architectures.associative_memory.guard import blamed
from clplat.architectures.associative_memory.layout import documents_of
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.presets import LayerKind, TitansLMM
from clplat.architectures.associative_memory.reading import Reading, StartsOfItself
from clplat.architectures.associative_memory.telemetry import ShowsWrites, measured
from clplat.architectures.base import LevelPeriod, State
from clplat.architectures.continuum_memory.feed import ContinuumFeed
from clplat.architectures.continuum_memory.next_token import NextTokenLevel
from clplat.architectures.continuum_memory.options import DenseFeed, FeedForwardKind
from clplat.architectures.continuum_memory.start import begin_from, weights_in
from clplat.architectures.decoder import Block, Decoder, check_language, mixing_state
from clplat.architectures.hope import presets as _hope  # noqa: F401
from clplat.architectures.hope.memory import SelfModifyingMemory
from clplat.architectures.layers import Angles, Attention, Cache, causal_document_mask, rotary_angles

# Kinds of layers go by bare names once their modules are imported.
from clplat.architectures.option_checks import check_at_least, check_sizes
from clplat.streams.base import Spec, Task


class AttentionLayer(LayerKind):
    """Causal softmax attention with rotary positions, as in `Transformer`."""

    def __init__(self, *, num_heads: int = 4, num_kv_heads: int | None = None, rope_base: float = 10_000.0) -> None:
        """`num_kv_heads` defaults to `num_heads`."""
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self.rope_base = rope_base
        check_at_least(self, 1, "num_heads", "num_kv_heads")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"AttentionLayer.num_kv_heads: {num_kv_heads} does not divide num_heads ({num_heads})")

    def build(self, hidden_size: int) -> RotaryAttention:
        """The layer; ValueError where a head cannot be turned in pairs."""
        if hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"AttentionLayer.num_heads: hidden_size ({hidden_size}) is no multiple of 2 * {self.num_heads}"
            )
        return RotaryAttention(
            hidden_size=hidden_size, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, rope_base=self.rope_base
        )


class RotaryAttention(nn.Module):
    """`layers.Attention` as a layer of the list: it makes its angles and takes its mask from a `Reading`."""

    def __init__(self, *, hidden_size: int, num_heads: int, num_kv_heads: int, rope_base: float) -> None:
        super().__init__()
        self.rope_base = rope_base
        self.attention = Attention(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass."""
        return self.attention(x_BTC, self._angles(reading), reading.mask)

    def continued(self, x_BTC: Tensor, cache: Cache, reading: Reading) -> tuple[Tensor, Cache]:
        """New tokens after those in the cache."""
        assert reading.mask is not None
        return self.attention.continued(x_BTC, cache, self._angles(reading), reading.mask, reading.positions)

    def empty_state(self, batch_size: int) -> Cache:
        """A cache of no tokens."""
        return self.attention.empty_state(batch_size)

    def mixing_flops(self, tokens: int) -> float:
        """As `Attention`."""
        return self.attention.mixing_flops(tokens)

    def _angles(self, reading: Reading) -> Angles:
        return rotary_angles(reading.positions, self.attention.head_size, self.rope_base)


class MemoryTransformer(Decoder):
    """Decoder-only language model of memory layers and attention: tokens (B, T) to logits (B, T, V)."""

    may_idle = True  # what writes a memory, in rows that end before its first chunk does
    paper = "Behrouz et al. 2024, arXiv:2501.00663; Sun et al. 2024, arXiv:2407.04620"
    fidelity: ClassVar[Literal["exact", "mechanism", "interpretation", "standard"]] = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        layers: Sequence[LayerKind] | None = None,
        repeat: int = 1,
        feed_forward: FeedForwardKind | None = None,
        mlp_ratio: float = 8 / 3,
        dropout: float = 0.0,
        document_mask: bool = True,
        tie_head: bool = True,
        initial_std: float = 0.02,
        start_from: str | None = None,
    ) -> None:
        """`layers` from the input to the output, `repeat` times over; None are four of TitansLMM. Each has a SwiGLU
        behind it, whose inner size is `mlp_ratio` times the hidden size, rounded up to a multiple of 32, or what
        `feed_forward` says: `ContinuumMemory`, whose levels have `expand` in place of `mlp_ratio`. `document_mask`
        begins every document of a row with an empty memory. `start_from`: a file of weights, or a run's checkpoint, of
        a decoder that this one begins as (with AttentionLayers, of a `Transformer`); levels begin as its SwiGLU. The
        rest is as in `Transformer`."""
        check_language(type(self), spec)
        check_sizes(type(self).__name__, hidden_size=hidden_size, mlp_ratio=mlp_ratio)
        kinds = [TitansLMM()] * 4 if layers is None else list(layers)
        if not kinds or repeat < 1:
            name, value = ("layers", "an empty list") if not kinds else ("repeat", repeat)
            raise ValueError(f"MemoryTransformer.{name}: must give at least one layer, got {value}")
        fed = DenseFeed(mlp_ratio=mlp_ratio) if feed_forward is None else feed_forward
        blocks = (
            Block(
                hidden_size=hidden_size,
                attention=_built(kinds, number, hidden_size),
                mlp=fed.build(hidden_size),
                dropout=dropout,
            )
            for number in list(range(len(kinds))) * repeat
        )
        super().__init__(
            spec=spec, hidden_size=hidden_size, blocks=blocks, dropout=dropout, document_mask=document_mask,
            tie_head=tie_head, initial_std=initial_std,
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, StartsOfItself):
                module.reset_dynamics()
        if start_from is not None:
            begin_from(self, weights_in(start_from))

    def task_start(self, task: Task) -> None:
        """Layers that are read in stages enter the one of that task."""
        self._enter(task.index)

    def may_grow(self) -> bool:
        """Stages are chunks and step sizes: no weight depends on them."""
        return type(self).task_start is not MemoryTransformer.task_start

    def structure(self) -> Mapping[str, Any]:
        """The task whose stage layers are in, if any has stages."""
        tasks = [module.task for module in self._staged()]
        return {"task": tasks[0]} if tasks else {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Layers enter their stage again."""
        if structure:
            self._enter(structure["task"])

    def measurements(self) -> Mapping[str, float]:
        """What the memories of each layer did with the first row that was evaluated last; see `telemetry.measured`."""
        found: dict[str, float] = {}
        for name, layer in self.named_modules():
            if isinstance(layer, ShowsWrites):
                place = name.removeprefix("blocks.")
                found |= {f"memory.{place}.{key}": value for key, value in measured(layer, f"layer {place}").items()}
        return found

    def not_finite(self) -> str | None:
        """The layer and the heads whose memories gave out the first number that was not finite; see `guard.py`."""
        mixers = {name: module for name, module in self.named_modules() if isinstance(module, CarryingMixer)}
        return blamed({f"layer {name.removeprefix('blocks.')}": mixer.guard for name, mixer in mixers.items()})

    def writes_memory(self) -> bool:
        """Whether a layer or a level of the token clock is a memory."""
        return bool(self._memories())

    @contextmanager
    def without_writes(self) -> Iterator[None]:
        """Within it no memory writes or forgets: each is what it was at the start."""
        memories = self._memories()
        for memory in memories:
            memory.writes = False
        try:
            yield
        finally:
            for memory in memories:
                memory.writes = True

    def facts(self) -> Mapping[str, str]:
        """What computed the memories' last pass, by layer's number where layers differ, and what the levels of a
        continuum memory learn from."""
        modules = ((n, module) for n, block in enumerate(self.blocks) for module in block.modules())
        taken = {n: module.memory.backend for n, module in modules if isinstance(module, CarryingMixer)}
        fed = self.blocks[0].mlp
        learned = fed.facts() if isinstance(fed, ContinuumFeed) else {}
        if len(set(taken.values())) == 1:
            return {"memory_backend": next(iter(taken.values()))} | learned
        return {f"memory_backend.{n}": backend for n, backend in taken.items()} | learned

    def levels(self) -> Mapping[str, LevelPeriod]:
        """The levels of a continuum memory at the clock of training steps, each with its parameters in all blocks."""
        found: dict[str, LevelPeriod] = {}
        for name, module in self.named_modules():
            if isinstance(module, ContinuumFeed):
                for level, own in module.periods(name).items():
                    before = found[level].parameters if level in found else ()
                    found[level] = dataclasses.replace(own, parameters=before + own.parameters)
        return found

    def next_token_levels(self) -> Mapping[str, LevelPeriod]:
        """Levels of the token clock that learn while a text is scored; none where memories are kept from writing."""
        return {
            name: LevelPeriod(
                parameters=tuple(f"{name}.{own}" for own, _ in level.named_parameters()), period=level.size.period,
                lr=level.size.lr, reduction=level.size.reduction,
            )
            for name, level in self._reading_levels().items()
            if level.writes and level.size.lr
        }  # fmt: skip

    @contextmanager
    def rows_answer_by(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it these levels have weights for each row of its own."""
        levels = self._reading_levels()
        try:
            for name, level in levels.items():
                names = {part: f"{name}.{part}" for part, _ in level.named_parameters()}
                level.rows = {p: weights[n] for p, n in names.items() if n in weights} or None
            yield
        finally:
            for level in levels.values():
                level.rows = None

    def _memories(self) -> list[AssociativeMemory | SelfModifyingMemory | NextTokenLevel]:
        kinds = AssociativeMemory | SelfModifyingMemory | NextTokenLevel
        return [module for module in self.modules() if isinstance(module, kinds)]

    def _reading_levels(self) -> dict[str, NextTokenLevel]:
        return {name: module for name, module in self.named_modules() if isinstance(module, NextTokenLevel)}

    def _staged(self) -> list[tnt.TNTMixer]:
        return [module for module in self.modules() if isinstance(module, tnt.TNTMixer)]

    def _enter(self, task: int) -> None:
        for module in self._staged():
            module.enter(task)

    def _learns_while_reading(self) -> bool:
        return any(isinstance(module, AssociativeMemory | CarryingMixer) for module in self.modules())

    def _context(self, tokens: Tensor, segment_ids: Tensor | None) -> tuple[Any, ...]:
        positions, before = torch.arange(tokens.shape[1], device=tokens.device), tokens.new_zeros(len(tokens))
        mask = documents = None
        if segment_ids is not None:
            mask = causal_document_mask(segment_ids)
            documents = documents_of(segment_ids) if self._learns_while_reading() else None
        return (Reading(positions=positions, mask=mask, documents=documents, lengths=before),)

    def _continued_context(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Any, ...]:
        positions = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        # A cache is a pair; all caches are equally wide, and without one nobody looks at the mask.
        width = next((held[0].shape[1] for held in map(mixing_state, state) if len(held) == 2), 0)
        columns = torch.arange(width + tokens.shape[1], device=tokens.device)
        mask = (columns <= positions.unsqueeze(-1)).unsqueeze(1)
        return (Reading(positions=positions, mask=mask, documents=None, lengths=lengths),)

    def _held(self, tokens: Tensor, state: State) -> Tensor:
        first = mixing_state(state[0])
        if len(first) == 2:
            return tokens.new_full((len(tokens),), first[0].shape[1])
        _, _, pending, held = first
        return held + pending.shape[1]


def _built(kinds: Sequence[LayerKind], number: int, hidden_size: int) -> nn.Module:
    """That layer of a list; what is wrong with one of several is said of its place."""
    try:
        return kinds[number].build(hidden_size)
    except ValueError as error:
        raise ValueError(f"layers.{number}: {error}" if len(kinds) > 1 else str(error)) from error
