"""Low-rank adapters: their options, the layers that they may go to, and our own layer for models of this repository.

A layer y = W x becomes y = W x + (alpha / rank) · Σ B A x over its active adapters, with W left alone, A (rank, in)
drawn as torch draws a linear layer and B (out, rank) zero: a new adapter changes nothing (Hu et al. 2021,
arXiv:2106.09685, §4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from clplat.architectures.option_checks import check_at_least, check_dropout

EXPERTS = "experts"
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj", "gate_up_proj")
"""Names that pretrained models give to layers which hold several matrices side by side."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Options of low-rank adapters; defaults are those of I-LoRA's first code (rank 8, alpha 16, dropout 0.05).

    `targets`: ends of the names of linear layers, for example `q_proj` or `mlp.down`; None takes the model's own
    default. `dropout` acts on the adapters' input, in training alone.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: list[str] | None = None

    group = "lora"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rank")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha: must be above 0, got {self.alpha}; 0 would take the adapter away")
        check_dropout("lora", self.dropout)
        if self.targets is not None and len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets: names a layer twice: {self.targets}")
        if self.targets == []:
            raise ValueError("lora.targets: name at least one layer, or leave it out for the model's default")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """A linear layer with adapters by name; its attributes are called as those of peft's layer."""

    def __init__(self, base_layer: nn.Linear, options: LoRA) -> None:
        super().__init__()
        self.base_layer, self.options = base_layer, options
        self.lora_dropout = nn.Dropout(options.dropout)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.active: list[str] = []

    @property
    def weight(self) -> Tensor:
        """W alone: models ask it for dtype and device."""
        return self.base_layer.weight

    def add(self, adapter: str) -> None:
        """One more adapter, in float32 where W is coarser, so that small steps are not rounded away."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        made = {"device": self.weight.device, "dtype": kind, "bias": False}
        first = nn.Linear(self.base_layer.in_features, self.options.rank, **made)
        last = nn.Linear(self.options.rank, self.base_layer.out_features, **made)
        nn.init.zeros_(last.weight)
        self.lora_A[adapter], self.lora_B[adapter] = first, last

    def set_adapter(self, adapters: list[str]) -> None:
        self.active = list(adapters)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.active = []

    def forward(self, x: Tensor) -> Tensor:
        answer = self.base_layer(x)
        for adapter in self.active:
            first, last = self.lora_A[adapter], self.lora_B[adapter]
            change = last(first(self.lora_dropout(x.to(first.weight.dtype)))) * self.options.scale
            answer = answer + change.to(answer.dtype)
        return answer


def insert(model: nn.Module, adapter: str, options: LoRA, targets: Sequence[str]) -> None:
    """Give the targets of a model of ours one more adapter, which is not active yet."""
    for path in [path for path, _ in matching(model, targets)]:
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        layer = getattr(holder, name)
        if isinstance(layer, nn.Linear):
            layer = LoRALinear(layer, options)
            layer.train(holder.training)
            setattr(holder, name, layer)
        layer.add(adapter)


def matching(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of what the targets name."""
    for path, module in model.named_modules():
        if any(path == target or path.endswith(f".{target}") for target in targets):
            yield path, module


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is linear, or GPT-2's `Conv1D`, which is with its weights transposed (peft knows it)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def check_targets(model: nn.Module, targets: Sequence[str], *, fused: bool) -> None:
    """ValueError for a target that names no layer, no linear one, an expert, or a fused one where `fused` is False."""
    for target in targets:
        found = list(matching(model, [target]))
        name = target.rpartition(".")[2]
        of_experts = [path for path, _ in model.named_parameters() if EXPERTS in path.split(".") and name in path]
        if any(EXPERTS in path.split(".") for path, _ in found) or (of_experts and not found):
            raise ValueError(
                f"lora.targets: {target!r} names experts of {type(model).__name__}, and adapters of experts are not "
                "supported; name layers of its attention"
            )
        if not found:
            raise ValueError(f"lora.targets: no layer of {type(model).__name__} is called {target!r}; "
                             f"{_linear_names(model)}")  # fmt: skip
        if not fused and name in FUSED:
            raise ValueError(
                f"lora.targets: {target!r} holds several matrices in one, and one adapter would mix them; choose a "
                f"model that keeps them apart, or other layers: {_linear_names(model)}"
            )
        wrong = [module for _, module in found if not is_linear(module)]
        if wrong:
            raise ValueError(f"lora.targets: {target!r} is a {type(wrong[0]).__name__}, not a linear layer; "
                             f"{_linear_names(model)}")  # fmt: skip


def check_rank(model: nn.Module, targets: Sequence[str], rank: int) -> None:
    """ValueError for a rank that no layer of the targets can use: a change of a matrix has its smaller side as rank."""
    sides = {path: min(cast(Any, layer).weight.shape) for path, layer in matching(model, targets)}
    path, most = max(sides.items(), key=lambda item: item[1])
    if rank > most:
        raise ValueError(f"lora.rank: {rank} is more than any of its layers can use: a change of {path}, the largest, "
                         f"has rank {most} at most; give {most} or less")  # fmt: skip


def _linear_names(model: nn.Module) -> str:
    layers = [path for path, module in model.named_modules() if is_linear(module)]
    names = sorted({path.rpartition(".")[2] for path in layers}.difference(FUSED))
    fused = [part for part in FUSED if any(path.endswith(part) for path, _ in model.named_modules())]
    hint = f" ({', '.join(fused)}: several matrices in one, which take no adapter)" if fused else ""
    return f"its linear layers are {', '.join(names) or 'none'}{hint}"
