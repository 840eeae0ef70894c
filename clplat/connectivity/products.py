"""Lines between the changes that low-rank adapters make: the products B·A move, and not their factors one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clplat.architectures.base import Adapters, Architecture
from clplat.connectivity.lines import Losses, Snapshot, State, Walk, moved, walk
from clplat.connectivity.measure import Measure

Factors = list[State]
"""The tensors of every active adapter, by name."""


def factors_of(model: Architecture) -> Factors:
    if not isinstance(model, Adapters):
        return []
    named = [model.adapter_parameters(adapter) for adapter in model.active] if model.adapter_names() else []
    return [{name: value.detach().clone() for name, value in tensors.items()} for tensors in named]


def low_rank(factors: Factors) -> bool:
    """Whether there are adapters, all of them products B A."""
    return bool(factors) and all(name.endswith((".lora_A", ".lora_B")) for tensors in factors for name in tensors)


def product_walks(
    model: Any, pairs: Sequence[tuple[Snapshot, Snapshot]], factors: Mapping[int, Factors], own: str,
    alphas: Sequence[float], measure: Measure,
) -> Iterator[Walk]:  # fmt: skip
    """Lines between the changes themselves, (1 − α) Σ B_i A_i + α Σ B_j A_j: both ends' adapters answer together, each
    with its B scaled."""
    added = [f"line_{number}" for number in range(2 * max(map(len, factors.values())))]
    for adapter in added:
        model.add_adapter(adapter)
    model.eval()  # new adapters come with a dropout of their own
    for first, second in pairs:
        ends = (factors[first.index], factors[second.index])

        def losses(alpha: float, first: Snapshot = first, second: Snapshot = second, ends: Any = ends) -> Losses:
            set_adapters(model, added, ends, alpha)
            return measure(first.index, second.index)

        apart = product_distance(*ends)
        yield walk((first.task, second.task), "products", moved(first, second, own), apart, alphas, losses)


@torch.no_grad()
def set_adapters(model: Any, added: Sequence[str], ends: tuple[Factors, Factors], alpha: float) -> None:
    scaled = [(1 - alpha, tensors) for tensors in ends[0]] + [(alpha, tensors) for tensors in ends[1]]
    used = added[: len(scaled)]
    for adapter, (share, tensors) in zip(used, scaled, strict=True):
        for name, parameter in model.adapter_parameters(adapter).items():
            parameter.copy_(tensors[name] * share if name.endswith("lora_B") else tensors[name])
    model.use_adapters(used, [])


def product_distance(first: Factors, second: Factors) -> float:
    layers = [name.removesuffix(".lora_A") for name in second[0] if name.endswith(".lora_A")]
    found = [(_change(second, layer) - _change(first, layer)).square().sum() for layer in layers]
    return float(torch.stack(found).sum().sqrt())


def _change(adapters: Factors, layer: str) -> Tensor:
    return torch.stack([a[f"{layer}.lora_B"].double() @ a[f"{layer}.lora_A"].double() for a in adapters]).sum(0)
