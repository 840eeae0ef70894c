"""Replay of what the model answered: dark experience."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.buffers import Policy
from clplat.strategies.replay import ExperienceReplay, current_rows
from clplat.streams.batch import AUXILIARY, REPLAY, Batch


class DERpp(ExperienceReplay):
    """Dark experience replay ++: one draw is held to its stored logits, another to its labels.

    Both draws go through the model together with the current rows. For classification only: on language every
    token would bring a whole vocabulary of logits.
    """

    knobs = ("ratio", "alpha", "beta")
    paper = "Buzzega et al. 2020, arXiv:2004.07211, Eq. 6"
    fidelity = "exact"

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        alpha: float = 0.3,
        beta: float = 0.5,
        from_task: int = 2,
    ) -> None:
        """`alpha` weighs the mean squared distance to stored logits, `beta` the cross-entropy of the second draw.

        Each draw has `ratio`/2 rows for each current one, so that a step replays as many rows as with
        `ExperienceReplay` at the same ratio. The paper draws a whole batch for each term from the first task on:
        `ratio` 2, `from_task` 1.
        """
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, from_task=from_task
        )
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha, beta: must not be negative, got {alpha} and {beta}")
        self.alpha, self.beta = alpha, beta

    def setup(self, context: Context) -> None:
        if context.spec.kind == "language":
            raise ValueError(
                f"DERpp would store {context.spec.num_outputs} logits for every token; use ExperienceReplay on language"
            )
        super().setup(context)
        self.matched = slice(0, 0)

    def row_bytes(self) -> int:
        return super().row_bytes() + 4 * self.context.spec.num_outputs

    def batch(self, batch: Batch) -> Batch:
        self.fresh.append(current_rows(batch))
        mixed = self.with_replay(batch, AUXILIARY, self.ratio / 2 if self.alpha else 0.0, 0.0)
        self.matched = slice(len(batch), len(mixed))
        return self.with_replay(mixed, REPLAY, self.ratio / 2 if self.beta else 0.0, self.beta)

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        # Current rows stand first in a mixed batch; what the model answers now is what it is held to later.
        current = self.fresh[-1]
        answers = output.logits[: len(current)].detach().float()
        self.fresh[-1] = replace(current, extra={"logits": answers})
        if self.matched.start == self.matched.stop:
            return None
        return self.alpha * F.mse_loss(output.logits[self.matched].float(), batch.extra["logits"][self.matched])
