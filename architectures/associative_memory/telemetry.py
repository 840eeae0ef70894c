"""What memories do, measured when somebody asks: from the first row of the last evaluated batch, and nothing before."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.architectures.associative_memory.mixer import MemoryMixer
from clplat.architectures.associative_memory.network import loss


@torch.no_grad()
def measured(mixer: MemoryMixer, place: str) -> dict[str, float]:
    """Means over tokens and heads: the inner loss of all pairs with the first weights and with those that all pairs
    left, how far these are from the first as a share of their norm (where that is not 0), step sizes, and what gates
    keep. Empty before any evaluation.

    Raises FloatingPointError with `place` and the head where a memory is not finite.
    """
    if mixer.last_row is None:
        return {}
    x = mixer.last_row
    memory = mixer.memory
    backend, tokens = memory.backend, mixer._tokens(x, mixer.qkv(x), None, None)
    _, end = memory(tokens)
    memory.backend = backend
    given, first = memory.prepared(tokens), memory.empty_state(1)
    after = torch.stack([part.square().sum((-2, -1)) for part in end.weights]).sum(0)
    bad = (~after.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{place}: the memory of head {', '.join(map(str, bad))} is not finite; lower projection.max_rate, or use "
            "damped or a smaller chunk"
        )
    target = given.v if memory.rule.target == "value" else memory.read(first.weights, given.v)

    def inner(weights: tuple[Tensor, ...]) -> float:
        return float(loss(memory.read(weights, given.k), target, memory.rule.bias, given.threshold).mean())

    found = {"loss_before": inner(first.weights), "loss_after": inner(end.weights), "rate": float(given.rate.mean())}
    norm = sum(float(part.square().sum()) for part in first.weights) ** 0.5
    moved = sum(float((now - old).square().sum()) for now, old in zip(end.weights, first.weights)) ** 0.5
    if norm:
        found["moved"] = moved / norm
    if given.log_decay:
        found["kept"] = float(torch.stack([gate.exp().mean() for gate in given.log_decay]).mean())
    if given.log_momentum is not None:
        found["momentum"] = float(given.log_momentum.exp().mean())
    return found
