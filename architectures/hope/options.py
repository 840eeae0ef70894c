"""The choices of a self-modifying memory; one that cannot be raises ValueError with the field's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from clplat.architectures.associative_memory.carrying import OutputGate
from clplat.architectures.associative_memory.rule import (
    BiasOptions,
    Delta,
    DeltaOn,
    MemoryRule,
    NetworkOptions,
    Target,
    check_rate,
)
from clplat.architectures.option_checks import check_at_least, check_choices, check_finite, check_idle

Generated = Literal["query", "key", "value", "rate", "decay"]
Read = Literal["before", "after", "chunk_start"]
Source = Literal["own", "shared"]


@dataclass(frozen=True, kw_only=True)
class SelfModifyingOptions:
    """What each head's memories are, and which of their inputs they make themselves.

    `network` of every memory. `generated`: what memories of their own make of a token while the row is read; all else
    is a trained projection (key, value, query) or gate (rate, decay). `inputs`: what each of these memories makes it
    of, a projection of its `own` or one that those of a head have `shared` (INFERRED; docs/hope.md: what it costs).
    `delta`, `delta_on`, `bias`, `target`, `max_gradient` as in `MemoryRule`. `unit_values`: values have unit length, as
    queries and keys do.

    `chunk` of the memory that answers and `generator_chunk` of the others: tokens that share what was known when their
    chunk began; the longer is a multiple of the shorter. `read`: by the memory before the token's own write, behind it,
    or as the chunk began. `max_rate` bounds the step sizes: 1 where memories erase, else 1 / chunk. Steps with momentum
    are multiplied by 1 − momentum if `damped`; what is erased is not. `rate_start`, a share of `max_rate`, and the
    other starts are what gates begin with. `compiled`: what has no kernel computes a chunk as one graph of
    torch.compile, which changes speed, bytes and rounding alone.
    """

    group: ClassVar[str] = "options"

    network: NetworkOptions = field(default_factory=lambda: NetworkOptions(depth=2, expand=4, residual=True))
    generated: Sequence[Generated] = ("key", "value", "rate", "decay")
    inputs: Source = "own"
    delta: Delta = "double"
    delta_on: DeltaOn = "every"
    bias: BiasOptions = field(default_factory=BiasOptions)
    target: Target = "self"
    unit_values: bool = True
    max_gradient: float | None = 1.0
    decay: bool = True
    momentum: bool = True
    chunk: int = 16
    generator_chunk: int = 16
    read: Read = "before"
    max_rate: float | None = None
    damped: bool = True
    compiled: bool = False
    conv_width: int = 4
    output_gate: OutputGate = "silu"
    rate_start: float = 0.5
    decay_start: float = 0.99
    momentum_start: float = 0.9

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, read=Read, inputs=Source, output_gate=OutputGate)
        check_at_least(self, 1, "chunk", "generator_chunk", "conv_width")
        if unknown := sorted(set(self.generated) - {"query", "key", "value", "rate", "decay"}):
            raise ValueError(f"options.generated: must be of query, key, value, rate, decay, got {unknown[0]!r}")
        if max(self.chunk, self.generator_chunk) % min(self.chunk, self.generator_chunk):
            raise ValueError(
                f"options.generator_chunk: must divide chunk ({self.chunk}) or be a multiple of it, got "
                f"{self.generator_chunk}"
            )
        if self.network.norm:
            raise ValueError(
                "options.network.norm: these memories have none; each layer's answer is normed behind them"
            )
        if self.bias.kind == "huber":
            raise ValueError("options.bias.kind: huber needs a threshold for each token, which nothing gives here")
        self._check_idle()
        check_rate("options.max_rate", self.largest_rate, self.rule)
        for name in ("rate_start", "decay_start", "momentum_start"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"options.{name}: must lie between 0 and 1, got {getattr(self, name)}")

    def _check_idle(self) -> None:
        if self.delta == "none":
            check_idle(self, "delta none", "delta: single", "delta_on")
        if not self.momentum:
            check_idle(self, "momentum false", "momentum: true", "momentum_start")
        if not self.decay:
            check_idle(self, "decay false", "decay: true", "decay_start")
            if "decay" in self.generated and tuple(self.generated) != ("key", "value", "rate", "decay"):
                raise ValueError("options.generated: decay is made for nothing with decay: false; leave it out")

    @property
    def rule(self) -> MemoryRule:
        """Under which every memory is written; its chunk is that of the memory that answers."""
        return MemoryRule(
            memory=self.network, bias=self.bias, retention="decay" if self.decay else "none",
            optimizer="momentum" if self.momentum else "gd", chunk=self.chunk, target=self.target, delta=self.delta,
            delta_on=self.delta_on, max_gradient=self.max_gradient,
        )  # fmt: skip

    @property
    def largest_rate(self) -> float:
        """The upper bound of step sizes: 1 where memories erase, else 1 / chunk, as all tokens of it step together."""
        if self.max_rate is not None:
            return self.max_rate
        return 1.0 if self.delta != "none" else 1 / max(self.chunk, self.generator_chunk)

    @property
    def generators(self) -> tuple[str, ...]:
        """The memories beside the one that answers, in the order in which they are kept."""
        named = [name for name in ("query", "key", "value", "rate", "decay") if name in self.generated]
        return tuple(name for name in named if name != "decay" or self.decay)

    @property
    def groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """Memories that are written together, and their chunk; the one that answers is the very last."""
        if self.chunk == self.generator_chunk or not self.generators:
            return (((*self.generators, "memory"), self.chunk),)
        return (self.generators, self.generator_chunk), (("memory",), self.chunk)
