"""What a continuum memory is made of, as a configuration says it:

feed_forward:
  class_path: ContinuumMemory
  init_args:
    levels: [{period: 1}, {period: 16, lr: 1e-3}, {period: 64, clock: token}]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from clplat.architectures.continuum_memory.feed import ContinuumFeed
from clplat.architectures.continuum_memory.levels import Clock, LevelSize, Loss, Reduction
from clplat.architectures.layers import SwiGLU
from clplat.architectures.option_checks import check_at_least, check_choices, check_finite

Carry = Literal["sequential", "nested", "independent"]


class FeedForwardKind(ABC):
    """Base of what may stand behind the mixing layers of a `MemoryTransformer`."""

    @abstractmethod
    def build(self, hidden_size: int) -> nn.Module:
        """The layer for a stream of that width: from x to what is added, or a `decoder.ReadingFeed`."""


class DenseFeed(FeedForwardKind):
    """A SwiGLU whose inner size is `mlp_ratio` times the hidden size, rounded up to a multiple of 32."""

    def __init__(self, *, mlp_ratio: float = 8 / 3) -> None:
        self.mlp_ratio = mlp_ratio

    def build(self, hidden_size: int) -> SwiGLU:
        """The layer."""
        return SwiGLU(hidden_size=hidden_size, inner_size=32 * math.ceil(self.mlp_ratio * hidden_size / 32))


@dataclass(frozen=True, kw_only=True)
class CMSLevel:
    """One level of a continuum memory: a SwiGLU that changes at every `period`-th beat of its clock alone.

    `clock`: step, the training steps of the run, where the level learns by the run's own loss under `LevelClock`; or
    token, the tokens of a sequence, where each row has weights of its own that begin at the trained ones and learn
    while they read. `loss` of the token clock: local (None), ½ mean (F(x) − W_v x)²; or next_token, the text's own,
    which scorers of a text's likelihood take and let the level learn by, and which changes nothing in training.
    `lr`: of the level's updates. At the step clock None leaves it to the optimizer, and it changes the rate of this
    level alone; at the token clock None is ½ a period: a unit input that fills a period is then halfway learned; with
    next_token it is 0.1 a period. 0 is a level that stands still. `reduction` of a period's gradients: added up, as
    printed, or averaged. `expand`: inner over hidden size, rounded up to a multiple of 32.
    `name` defaults to the clock and the period: step16, token64.
    """

    period: int = 1
    clock: Clock = "step"
    loss: Loss | None = None
    lr: float | None = None
    reduction: Reduction = "sum"
    expand: float = 8 / 3
    name: str | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, clock=Clock, reduction=Reduction)
        if self.loss is not None:
            check_choices(self, loss=Loss)
        check_at_least(self, 1, "period")
        check_at_least(self, 0, "lr")
        if self.loss is not None and self.clock == "step":
            raise ValueError(
                f"{self.group}.loss: is for clock: token; levels of training steps learn by the run's loss"
            )
        if self.expand <= 0:
            raise ValueError(f"{self.group}.expand: must be above 0, got {self.expand}")
        if self.name is not None and not self.name.isidentifier():
            raise ValueError(f"levels.name: must be a word of letters, digits and '_', got {self.name!r}")

    @property
    def group(self) -> str:
        """Under which errors name its options."""
        return f"levels.{self.called}"

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or f"{self.clock}{self.period}"

    def sized(self, hidden_size: int) -> LevelSize:
        """The same for a stream of that width, with nothing left open."""
        lr = self.lr
        if self.clock == "token" and lr is None:
            whole = 0.1 if self.loss == "next_token" else 0.5
            lr = whole / self.period if self.reduction == "sum" else whole
        inner = 32 * math.ceil(self.expand * hidden_size / 32)
        return LevelSize(
            name=self.called, period=self.period, clock=self.clock, lr=lr, reduction=self.reduction,
            hidden_size=hidden_size, inner_size=inner, loss=self.loss or "local",
        )  # fmt: skip


class ContinuumMemory(FeedForwardKind):
    """Levels in place of the feed-forward layer, from the input to the output.

    Behrouz et al. 2025 (Nested Learning, arXiv:2512.24695), Eq. 70-71 and 73-74. One level of period 1 is the usual
    SwiGLU.
    """

    def __init__(
        self, *, levels: Sequence[CMSLevel], carry: Carry = "sequential", residual: bool = True,
        start_rate: float = 0.5,
    ) -> None:  # fmt: skip
        """`carry`: sequential, each level reads what the one before gives; nested, the same, and a level begins anew
        whenever the next slower one's period ends, with weights that the slower one has learned (`nested.py`); or
        independent, all read the input and are added up with trained weights. `start_rate`: how much of what a nested
        level has learned goes into its next beginning, from 0 to 1, which is sequential. `residual`: levels one after
        another add to what they read, with a trained gain each; False is the bare composition, as printed."""
        self.levels, self.carry, self.residual, self.start_rate = tuple(levels), carry, residual, start_rate
        check_choices(self, carry=Carry)
        if not self.levels:
            raise ValueError("ContinuumMemory.levels: must give at least one level")
        names = [level.called for level in self.levels]
        if twins := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"ContinuumMemory.levels: two are called {twins[0]!r}; give them a `name` each")
        if carry == "independent" and not residual:
            raise ValueError("ContinuumMemory.residual: false is for carry: sequential and nested")
        if not 0 <= start_rate <= 1:
            raise ValueError(f"ContinuumMemory.start_rate: must lie between 0 and 1, got {start_rate}")
        if carry != "nested" and start_rate != 0.5:
            raise ValueError(
                f"ContinuumMemory.start_rate: {start_rate} has no effect with carry {carry}; leave it out, or set "
                "carry: nested"
            )
        if carry == "nested":
            _check_nesting(slowest_first(self.levels))

    def build(self, hidden_size: int) -> ContinuumFeed:
        """The layer."""
        sizes = [level.sized(hidden_size) for level in self.levels]
        if self.carry == "nested":
            slower = slowest_first(self.levels)
            outer = {inner.called: level for level, inner in zip(slower, slower[1:])}
            sizes = [self._nested(size, outer[size.name]) if size.name in outer else size for size in sizes]
        return ContinuumFeed(levels=sizes, independent=self.carry == "independent", residual=self.residual)

    def _nested(self, size: LevelSize, outer: CMSLevel) -> LevelSize:
        """A row is all that a token level knows of the training steps: there it begins anew with every row."""
        context = outer.period if outer.clock == size.clock else None
        return replace(size, within=outer.called, context=context, start_rate=self.start_rate)


def slowest_first(levels: Sequence[CMSLevel]) -> list[CMSLevel]:
    """Levels by their periods, those of training steps before those of tokens."""
    return sorted(levels, key=lambda level: (level.clock == "token", -level.period))


def _check_nesting(levels: Sequence[CMSLevel]) -> None:
    """ValueError unless each level's period goes into that of the next slower one, several times."""
    if len(levels) < 2:
        raise ValueError("ContinuumMemory.carry: nested needs two levels, of which one is slower; use sequential")
    if reading := [level.called for level in levels if level.loss == "next_token"]:
        raise ValueError(
            f"ContinuumMemory.carry: nested levels begin anew inside of the model, where {reading[0]} learns nothing; "
            "use loss: local, or carry: sequential"
        )
    for outer, inner in zip(levels, levels[1:]):
        if outer.clock == inner.clock and (outer.period == inner.period or outer.period % inner.period):
            raise ValueError(
                f"ContinuumMemory.levels: nested, the period of {outer.called} ({outer.period}) must be a multiple of "
                f"that of {inner.called} ({inner.period}), which begins anew inside of it"
            )
