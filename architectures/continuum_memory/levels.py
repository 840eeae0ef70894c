"""One level of a continuum memory: a SwiGLU that training steps, or one that tokens step.

Shapes: B rows, T tokens, C hidden size, I inner size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.rule import MemoryRule, NetworkOptions
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens
from clplat.architectures.associative_memory.telemetry import Written
from clplat.architectures.layers import SwiGLU

Clock = Literal["step", "token"]
Reduction = Literal["sum", "mean"]
Loss = Literal["local", "next_token"]


@dataclass(frozen=True, kw_only=True)
class LevelSize:
    """A level with nothing left open; `lr` None is the optimizer's.

    `loss`: of the token clock; the step clock has the run's.
    `within`: the next slower level, where the levels are nested. `context`: that one's period, for levels of one clock.
    """

    name: str
    period: int
    clock: Clock
    lr: float | None
    reduction: Reduction
    hidden_size: int
    inner_size: int
    loss: Loss = "local"
    within: str | None = None
    context: int | None = None
    start_rate: float = 1.0


class StepLevel(nn.Module):
    """A level whose weights are ordinary parameters; `LevelClock` keeps its period."""

    def __init__(self, size: LevelSize) -> None:
        super().__init__()
        self.size = size
        self.mlp = SwiGLU(hidden_size=size.hidden_size, inner_size=size.inner_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.mlp(x_BTC)

    @torch.no_grad()
    def begin_as(self, mlp: SwiGLU) -> None:
        """Take the weights of a feed-forward layer of the same size."""
        self.mlp.load_state_dict(mlp.state_dict())


class TokenLevel(nn.Module):
    """A level whose weights are a row's own and change at every `period`-th of its tokens.

    With θ the weights since the last boundary and F the SwiGLU, token t is answered by F_θ(x_t), and at the boundary
    θ ← θ − Σ rate_t ∇_θ ½‖F_θ(x_t) − W_v x_t‖², all gradients at θ: `AssociativeMemory` with a `swiglu` memory, plain
    descent, gradients and reads at the chunk's start. rate_t = lr / C, over the period for the mean, and less where
    x_t is longer than √C: the loss is a mean over features, and a long input does not overshoot.
    """

    def __init__(self, size: LevelSize) -> None:
        super().__init__()
        assert size.lr is not None
        self.size = size
        self.rate = size.lr / size.hidden_size / (size.period if size.reduction == "mean" else 1)
        rule = MemoryRule(
            memory=NetworkOptions(kind="swiglu", depth=2, inner_size=size.inner_size, activation="silu"),
            feature="identity", chunk=size.period, read="chunk_start",
        )  # fmt: skip
        self.fast = AssociativeMemory(rule=rule, num_heads=1, key_size=size.hidden_size, value_size=size.hidden_size)
        self.target = nn.Linear(size.hidden_size, size.hidden_size, bias=False) if self.rate else None
        self.last_row: Tensor | None = None

    def forward(self, x_BTC: Tensor, documents: Documents | None) -> Tensor:
        """A full pass over rows, packed with documents or each of one text."""
        if self.target is None:
            return self.resting(x_BTC)
        if not self.training:
            self.last_row = x_BTC[:1].detach().clone()
        return self._read_rows(x_BTC, documents)

    def _read_rows(self, x_BTC: Tensor, documents: Documents | None) -> Tensor:
        tokens = self._tokens(x_BTC, None)
        answers = self.fast(tokens)[0] if documents is None else self.fast.read_documents(tokens, documents)
        return answers.squeeze(1).to(x_BTC.dtype)

    def written(self, x_BTC: Tensor) -> dict[str, Written]:
        """What it does with a row (1, T, C); see `telemetry.py`."""
        tokens, first = self._tokens(x_BTC, None), self.fast.empty_state(1).weights
        return {"": Written(self.fast, (self.fast.prepared(tokens),), first, self._end(x_BTC, tokens))}

    def _end(self, x_BTC: Tensor, tokens: Tokens) -> Layers:
        """The weights behind a row."""
        return self.fast(tokens)[1].weights

    def continued(
        self, x_BTC: Tensor, state: tuple[Any, ...], counts_BT: Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Tokens after those in `state`, a `MemoryState` as a plain tuple; what does not count changes nothing."""
        if self.target is None:
            return self.resting(x_BTC), state
        answers, after = self.fast(self._tokens(x_BTC, counts_BT), MemoryState(*state))
        return answers.squeeze(1).to(x_BTC.dtype), tuple(after)

    def empty_state(self, batch_size: int) -> tuple[Any, ...]:
        """The state before any token."""
        return () if self.target is None else tuple(self.fast.empty_state(batch_size))

    def resting(self, x_BTC: Tensor) -> Tensor:
        """The answer of the weights that it begins with, bit for bit that of a SwiGLU with the same numbers."""
        gate, up, down = (part[0].mT for part in self.fast.first)
        gates, ups = F.linear(x_BTC, torch.cat([gate, up])).chunk(2, dim=-1)
        return F.linear(F.silu(gates) * ups, down.contiguous())

    @torch.no_grad()
    def begin_as(self, mlp: SwiGLU) -> None:
        """Take the weights of a feed-forward layer of the same size as those that every row begins with."""
        parts = (*mlp.gate_up.weight.chunk(2), mlp.down.weight)
        for own, part in zip(self.fast.first, parts, strict=True):
            own.copy_(part.mT.unsqueeze(0))

    def mixing_flops(self, tokens: int) -> float:
        """Operations of learning: for each number 2 to ask and 2 to write, behind the first layer 2 for the error's
        way back; reading is counted with the weights."""
        if self.target is None:
            return 0.0
        weights = self.size.hidden_size * self.size.inner_size
        return tokens * 2.0 * weights * (3 + 3 + 1)

    def _tokens(self, x_BTC: Tensor, counts_BT: Tensor | None) -> Tokens:
        assert self.target is not None
        read, target = x_BTC.unsqueeze(1), self.target(x_BTC).unsqueeze(1)
        wide = torch.promote_types(x_BTC.dtype, torch.float32)
        length = read.detach().to(wide).square().mean(-1).clamp(min=1.0)
        return Tokens(read, read, target, self.rate / length, (), None, None, counts_BT)
