"""Answers from between the weights of the last boundary and those of now: less forgotten, a little less learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from clplat.strategies.base import Fidelity, Strategy
from clplat.strategies.weights import assign_weights, flat_parameters
from clplat.streams.base import Task


class InterpolatedWeights(Strategy):
    """w = a + `share` (f − a): f the trained weights, a the anchor, which is w as the last task left it.

    The first task has no anchor: w = f. With `adopt` the trained weights become w when a task has ended, so that the
    next one goes on from there and every view sees them; else training is left alone and w answers in the view
    `interpolated`. Costs no replayed row, and one copy of the trainable weights, which is no stored row; running
    statistics stay those of f. Interpolation of fine-tuned with earlier weights is that of Wortsman et al. 2022
    (arXiv:2109.01903); at task boundaries it is ours.
    """

    knobs: ClassVar[tuple[str, ...]] = ("share",)
    paper = "Wortsman et al. 2022, arXiv:2109.01903"
    fidelity: ClassVar[Fidelity] = "mechanism"

    def __init__(self, *, share: float = 0.85, adopt: bool = False) -> None:
        """`share` 1 changes nothing; a smaller one keeps more of what was known. `adopt` as above."""
        if not 0 < share <= 1:
            raise ValueError(f"share: must lie above 0 and at most at 1, got {share}")
        self.share, self.adopt = share, adopt
        self.anchor: Tensor | None = None

    def weights(self) -> Tensor:
        """f, (P,)."""
        return flat_parameters(self.context.architecture).detach()

    def task_start(self, task: Task) -> None:
        if not self.context.past:
            return
        now = self.weights()
        if self.adopt or self.anchor is None:
            self.anchor = now
            return
        if len(self.anchor) != len(now):
            name = type(self.context.architecture).__name__
            raise ValueError(f"InterpolatedWeights: {name} has grown, and nothing lies between weights of different "
                             "number; use adopt, or an architecture that does not grow")  # fmt: skip
        self.anchor = torch.lerp(self.anchor, now, self.share)

    def task_end(self, task: Task) -> None:
        if self.adopt and self.anchor is not None:
            assign_weights(self.context.architecture, torch.lerp(self.anchor, self.weights(), self.share))

    def views(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        return {} if self.adopt else {"interpolated": self._shown}

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """The architecture with w, and f back afterwards."""
        model, own = self.context.architecture, self.weights()
        if self.anchor is not None:
            assign_weights(model, torch.lerp(self.anchor, own, self.share))
        try:
            yield
        finally:
            assign_weights(model, own)

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        anchor = state["anchor"]
        self.anchor = None if anchor is None else anchor.to(self.context.device(), copy=True)
