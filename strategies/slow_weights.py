"""A second set of weights beside those that are trained: it learns from few-shot episodes and takes a little over."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Architecture
from clplat.strategies.weights import flat_parameters, move_weights
from clplat.streams.batch import Batch
from clplat.streams.episodes import EpisodeShape, draw_episodes, prototype_logits


class SlowWeights:
    """A copy of an architecture with weights S of its own, always in evaluation mode.

    So its episodes neither drop units nor move running statistics: they draw from no random source but the one that
    they are given, and come out the same on every process.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.model = copy.deepcopy(architecture).eval()

    def copy_from(self, architecture: nn.Module) -> None:
        """All weights and running statistics of `architecture`."""
        self.model.load_state_dict(architecture.state_dict())

    def learn(
        self, rows: Batch, plasticity: Tensor, *, rate: float, episodes: int, shape: EpisodeShape,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """S ← S − rate · m ⊙ ∇ L_proto, once for each of `episodes` out of `rows`, with m = `plasticity` (P,).

        L_proto is the mean cross-entropy of `prototype_logits` over the queries. Episodes have as many classes as there
        are with rows enough, `shape.ways` at most; with fewer than two there is nothing to learn.
        """
        labels = rows.targets.cpu()
        ways = min(shape.ways, int((labels.bincount() >= shape.rows).sum()))
        if not episodes or ways < 2:
            return
        support, asked = draw_episodes(labels, replace(shape, ways=ways), episodes, generator)
        places = torch.cat([support, asked], dim=2).to(rows.inputs.device, non_blocking=True)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        rates = (rate * plasticity).split([p.numel() for p in weights])
        wanted = torch.arange(ways, device=rows.inputs.device).repeat_interleave(shape.queries)
        for episode in places:
            hidden = self.model(rows.rows(episode.flatten()), return_hidden="last").hidden
            features = hidden.float().view(ways, shape.rows, -1)
            loss = F.cross_entropy(prototype_logits(features[:, : shape.shots], features[:, shape.shots :]), wanted)
            pulls = torch.autograd.grad(loss, weights, materialize_grads=True)
            with torch.no_grad():
                for weight, own, pull in zip(weights, rates, pulls, strict=True):
                    weight.sub_(own.view_as(weight) * pull)

    def approach(self, architecture: nn.Module, share: Tensor | float) -> None:
        """S ← S + share ⊙ (f − S), with the trained weights f of `architecture` and `share` (P,) or one number."""
        move_weights(self.model, flat_parameters(architecture), share)

    @contextmanager
    def standing_in_for(self, architecture: nn.Module) -> Iterator[None]:
        """`architecture` with these weights and running statistics, and its own ones back afterwards."""
        own = {name: tensor.clone() for name, tensor in architecture.state_dict().items()}
        architecture.load_state_dict(self.model.state_dict())
        try:
            yield
        finally:
            architecture.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.model.state_dict()), "structure": dict(self.model.structure())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.restructure(state["structure"])
        self.model.load_state_dict(state["weights"])
