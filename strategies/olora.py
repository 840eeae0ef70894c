"""Orthogonal low-rank adaptation: every task learns in directions that earlier tasks left free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.adapters import adapters_of, first_adapter, new_adapter, refuse_numbers_by_weight
from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class OLoRA(Strategy):
    """O-LoRA: a new adapter for every task beside all earlier ones, which stay as they are and go on answering.

    Loss = CE + λ1 Σ_modules Σ_{i<t} Σ |A_i A_tᵀ| + λ2 Σ ‖new tensor‖₂. No replay, and no task identity in the answer,
    to which all adapters add up. The authors' program joins the frozen ones to one stack: the same sum.
    """

    knobs: ClassVar[tuple[str, ...]] = ("orthogonality", "norm")
    # Momenta of the last task's adapter mean nothing for the new one.
    restarts: ClassVar[bool] = True
    paper = "Wang et al. 2023, arXiv:2310.14152"
    fidelity: ClassVar[Fidelity] = "exact"

    def __init__(self, *, orthogonality: float = 0.5, norm: float = 0.0) -> None:
        """`orthogonality` is λ1 and `norm` λ2; defaults are those of the authors' scripts for short orders (for long
        ones λ1 up to 5 and λ2 up to 0.3)."""
        if orthogonality < 0 or norm < 0:
            raise ValueError(f"orthogonality, norm: must not be negative, got {orthogonality} and {norm}")
        self.orthogonality, self.norm = orthogonality, norm

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.model = adapters_of(context, "OLoRA")
        first = first_adapter(context, "OLoRA")
        if not any(name.endswith("lora_A") for name in self.model.adapter_parameters(first)):
            raise ValueError(f"OLoRA: the adapters of {type(self.model).__name__} are not low-rank ones; use "
                             "Pretrained or Adapted with lora")  # fmt: skip
        refuse_numbers_by_weight(context, "OLoRA")
        self.earlier: list[tuple[list[str], Tensor]] | None = None

    def task_start(self, task: Task) -> None:
        if self.context.past:
            adapter = f"task{task.index}"
            new_adapter(self.context, adapter)
            self.model.use_adapters([*self.model.active, adapter], [adapter])
        self.earlier = None

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        terms = []
        if self.orthogonality and len(self.model.active) > 1:
            terms.append(self.orthogonality * self.overlap())
        if self.norm:
            new = list(self.model.adapter_parameters(self.model.trained[0]).values())
            terms.append(self.norm * torch.stack(torch._foreach_norm(new)).sum())
        return torch.stack(terms).sum() if terms else None

    def overlap(self) -> Tensor:
        """Σ over modules and earlier adapters i of Σ |A_i A_tᵀ|, ()."""
        if self.earlier is None:
            self.earlier = self._earlier_factors()
        new = self.model.adapter_parameters(self.model.trained[0])
        parts = [(stack @ torch.stack([new[name] for name in names]).mT).abs().sum() for names, stack in self.earlier]
        return torch.stack(parts).sum()

    def _earlier_factors(self) -> list[tuple[list[str], Tensor]]:
        """Of the frozen adapters the factors A, (modules, adapters · rank, inputs), with the modules' names: one entry
        for each number of inputs, so that a step has a few products and not one for each module."""
        frozen = [self.model.adapter_parameters(name) for name in self.model.active if name not in self.model.trained]
        by_width: dict[int, list[str]] = {}
        for name, factor in frozen[0].items():
            if name.endswith("lora_A"):
                by_width.setdefault(factor.shape[1], []).append(name)
        return [
            (names, torch.stack([torch.cat([factors[name].detach() for factors in frozen]) for name in names]))
            for names in by_width.values()
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adapters, and which of them are trained, are part of the model."""
        self.earlier = None
