"""What memories do, measured when somebody asks: from the first row of the last evaluated batch, and nothing before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from clplat.architectures.associative_memory.network import loss
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import Layers, Tokens


class Reads(Protocol):
    """The form of a memory, whose weights are passed in."""

    @property
    def rule(self) -> MemoryRule: ...

    def read(self, weights: Layers, x_BHTD: Tensor, /) -> Tensor:
        """The answers (B, H, T, E) of weights that all tokens share."""
        ...


class Written(NamedTuple):
    """What a memory did with a row, or with the shards of one, as rows."""

    memory: Reads
    parts: tuple[Tokens, ...]
    """`prepared` tokens, one part behind the other."""
    first: Layers
    """Its weights before them."""
    end: Layers
    """Its weights behind them all."""
    tells_gates: bool = True
    """False where another memory has the same and tells of them."""

    def mean(self, quantity: Callable[[Tokens], Tensor]) -> float:
        """Of a quantity (B, H, T) over the tokens that count, and heads."""
        total, count = 0.0, 0
        for tokens in self.parts:
            values, counted = quantity(tokens), tokens.counted().unsqueeze(1)
            total += float(values.where(counted, 0.0).sum())
            count += int(counted.sum()) * values.shape[1]
        return total / count


@runtime_checkable
class ShowsWrites(Protocol):
    """A layer that can tell what its memories wrote of a row."""

    last_row: Tensor | None
    """(1, T, C) the first row that was evaluated last; no answer depends on it."""

    def written(self, x_BTC: Tensor) -> Mapping[str, Written]:
        """What each memory does with the row, by its name, which is empty where there is one alone."""
        ...


@torch.no_grad()
def measured(layer: ShowsWrites, place: str) -> dict[str, float]:
    """For each of the layer's memories means over tokens and heads: the inner loss of all pairs with the first weights
    and with those that all pairs left (of memories that begin anew, all pairs of their shard), how far these are from
    the first as a share of their norm (where that is not 0), step sizes, and what gates keep. Empty before any
    evaluation.

    Raises FloatingPointError with `place` and the head where a memory is not finite.
    """
    if layer.last_row is None:
        return {}
    found: dict[str, float] = {}
    for name, written in layer.written(layer.last_row).items():
        _check_finite(written, f"{place}, {name}" if name else place)
        found |= {f"{name}.{key}" if name else key: value for key, value in _of_one(written).items()}
    return found


def _check_finite(written: Written, place: str) -> None:
    after = torch.stack([part.square().sum((-2, -1)) for part in written.end]).sum(0)
    bad = (~after.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{place}: the memory of head {', '.join(map(str, bad))} is not finite; lower its max_rate, or use "
            "damped or a smaller chunk"
        )


def _of_one(written: Written) -> dict[str, float]:
    found = {"loss_before": _inner(written, written.first), "loss_after": _inner(written, written.end)}
    norm = _norms(written.first)
    if bool(norm.all()):
        moved = _norms(tuple(now - old for now, old in zip(written.end, written.first, strict=True)))
        found["moved"] = float((moved / norm).mean())
    return found | _gates(written) if written.tells_gates else found


def _gates(written: Written) -> dict[str, float]:
    found = {"rate": written.mean(lambda tokens: tokens.rate)}
    if written.parts[0].log_decay:
        found["kept"] = written.mean(_kept)
    if written.parts[0].log_momentum is not None:
        found["momentum"] = written.mean(_momentum)
    return found


def _norms(weights: Layers) -> Tensor:
    """(B,), of all heads and layers together."""
    return torch.stack([part.square().sum((1, 2, 3)) for part in weights]).sum(0).sqrt()


def _kept(tokens: Tokens) -> Tensor:
    return torch.stack([gate.exp().mean(-1) for gate in tokens.log_decay]).mean(0)


def _momentum(tokens: Tokens) -> Tensor:
    assert tokens.log_momentum is not None
    return tokens.log_momentum.exp()


def _inner(written: Written, weights: Layers) -> float:
    memory = written.memory

    def losses(tokens: Tokens) -> Tensor:
        target = tokens.v if memory.rule.target == "value" else memory.read(written.first, tokens.v)
        return loss(memory.read(weights, tokens.k), target, memory.rule.bias, tokens.threshold)

    return written.mean(losses)
