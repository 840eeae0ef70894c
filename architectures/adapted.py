"""A model of this repository with low-rank adapters: trained once as it is, then frozen, with adapters beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from clplat.architectures.adapters import AdapterHost, check_may_be_backbone, not_called
from clplat.architectures.base import Architecture, Decodes, Output, State
from clplat.architectures.lora import LoRA, insert
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

TARGETS = ["attention.qkv", "attention.out"]
"""Where adapters go by default: the attention of `Transformer` and its kin."""


class Adapted(AdapterHost):
    """A frozen language model of ours, with adapters that are trained beside its linear layers."""

    causal = True
    takes_fused = True

    def __init__(
        self, *, spec: Spec, model: Callable[[Spec], Architecture], lora: LoRA | None = None, weights: str | None = None
    ) -> None:
        """`model` is an architecture as a component; `weights` is a checkpoint or snapshot of a run that trained it
        (variables are expanded; None leaves its initial weights). `lora.targets` default to `attention.qkv` and
        `attention.out`; on a layer that holds several matrices they share one adapter."""
        # By keyword, which is how components take it.
        backbone = model(spec=spec)  # type: ignore[call-arg]
        name = type(backbone).__name__
        check_may_be_backbone(backbone, spec, "adapters")
        if weights is not None:
            backbone.load_state_dict(_weights_in(weights, name))
        super().__init__(backbone, lora or LoRA(), TARGETS)
        if unused := not_called(backbone, self._layers(), spec.input_shape[0]):
            raise ValueError(f"lora.targets: {name} reads the weights of {unused[0]} without calling the layer, so "
                             "that an adapter there does nothing; name others")  # fmt: skip

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        return self.backbone(batch, state, return_hidden)

    def init_state(self, batch_size: int) -> State:
        return self._model().init_state(batch_size)

    def decode(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Tensor, State]:
        """As the backbone decodes; ValueError where it does not."""
        if not isinstance(self.backbone, Decodes):
            raise ValueError(f"Adapted.model: {type(self.backbone).__name__} does not decode step by step")
        return self.backbone.decode(tokens, state, lengths)

    def flops_per_row(self) -> float:
        """The backbone's, which counts its adapters among its weights."""
        return self._model().flops_per_row()

    def active_parameters(self) -> int:
        return self._model().active_parameters() - self.resting_parameters()

    def facts(self) -> Mapping[str, str]:
        return {**super().facts(), **self._model().facts(), "model": type(self.backbone).__name__}

    def _model(self) -> Architecture:
        return cast(Architecture, self.backbone)

    def _insert(self, adapter: str) -> None:
        assert self.lora is not None
        insert(self.backbone, adapter, self.lora, self.targets)


def _weights_in(given: str, name: str) -> dict[str, Any]:
    """The architecture's state in a checkpoint; reading it executes nothing."""
    path = Path(os.path.expandvars(given))
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}; name a checkpoint or snapshot of a run")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not isinstance(state.get("architecture"), dict):
        raise ValueError(f"weights: {path} is no checkpoint of a run that trained {name}")
    return state["architecture"]
