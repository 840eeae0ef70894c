"""Replay of what the model answered: dark experience."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.buffers import Policy
from clplat.strategies.replay import ExperienceReplay, current_rows
from clplat.streams.batch import AUXILIARY, REPLAY, Batch


class DERpp(ExperienceReplay):
    """Dark experience replay ++: one draw is held to its stored logits, another to its labels."""

    knobs = ("ratio", "alpha", "beta")
    paper = "Buzzega et al. 2020, arXiv:2004.07211, Eq. 6"

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
        `ExperienceReplay` at the same ratio (the paper draws a whole batch for each term: ratio 2).
        """
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, from_task=from_task
        )
        self.alpha, self.beta = alpha, beta

    def setup(self, context: Context) -> None:
        if context.spec.kind == "language":
            raise ValueError(
                f"DERpp would store {context.spec.num_outputs} logits for every token; use ExperienceReplay on language"
            )
        super().setup(context)
        self.stored: slice | None = None

    def batch(self, batch: Batch) -> Batch:
        self.stored = None
        self.fresh.append(current_rows(batch))
        world = self.context.world
        count = round(self.ratio / 2 * len(batch) * world.size)
        if not count or not len(self.buffer) or not self.active():
            return batch
        share = (world.rank, world.size)
        matched = self.buffer.draw(count, share=share).with_origin(AUXILIARY, 0.0)
        labelled = self.buffer.draw(count, share=share).with_origin(REPLAY, self.beta)
        self.stored = slice(len(batch), len(batch) + len(matched))
        return batch.joined(matched).joined(labelled)

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        # Current rows stand first in a mixed batch; what the model answers now is what it is held to later.
        fresh = self.fresh[-1]
        fresh.extra = fresh.extra | {"logits": output.logits[: len(fresh)].detach().float()}
        if self.stored is None:
            return None
        return self.alpha * F.mse_loss(output.logits[self.stored], batch.extra["logits"][self.stored])
