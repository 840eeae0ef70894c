"""Replay of what the model answered: dark experience."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context, Fidelity
from clplat.strategies.buffers import Policy
from clplat.strategies.replay import ExperienceReplay, current_rows
from clplat.streams.batch import AUXILIARY, REPLAY, Batch


class DERpp(ExperienceReplay):
    """Dark experience replay ++: one draw is held to its stored logits, another to its labels.

    Both draws go through the model together with the current rows. On language every token would bring a whole
    vocabulary of logits: there `top_logits` keeps the largest few, and the distance is taken over these alone (our
    form; the paper has classification only).
    """

    knobs: ClassVar[tuple[str, ...]] = ("ratio", "alpha", "beta")
    paper = "Buzzega et al. 2020, arXiv:2004.07211, Eq. 6"
    fidelity: ClassVar[Fidelity] = "exact"
    draws: ClassVar[int] = 2

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
        top_logits: int | None = None,
    ) -> None:
        """`alpha` weighs the mean squared distance to stored logits, `beta` the cross-entropy of the second draw.

        Each draw has `ratio`/2 rows for each current one, so that a step replays as many rows as with
        `ExperienceReplay` at the same ratio. The paper draws a whole batch for each term from the first task on:
        `ratio` 2, `from_task` 1. `top_logits` of each answer are kept, in half precision; None keeps them all.
        """
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, from_task=from_task
        )
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha, beta: must not be negative, got {alpha} and {beta}")
        if top_logits is not None and top_logits < 1:
            raise ValueError(f"top_logits: must be positive, got {top_logits}")
        self.alpha, self.beta, self.top_logits = alpha, beta, top_logits

    def setup(self, context: Context) -> None:
        name, outputs = type(self).__name__, context.spec.num_outputs
        if context.spec.kind == "language" and self.top_logits is None:
            raise ValueError(
                f"{name}.top_logits: {outputs} logits would be stored for every token; say how many of them to keep"
            )
        if self.top_logits is not None and self.top_logits > outputs:
            raise ValueError(f"{name}.top_logits: the model has only {outputs} outputs, got {self.top_logits}")
        super().setup(context)
        self.matched = slice(0, 0)

    def row_bytes(self) -> int:
        # Four bytes a logit, or two and the four of its number.
        one = 6 * self.top_logits if self.top_logits else 4 * self.context.spec.num_outputs
        return super().row_bytes() + one * self.context.tasks[0].train.batch(torch.tensor([0])).targets.numel()

    def batch(self, batch: Batch) -> Batch:
        self.fresh.append(current_rows(batch))
        mixed = self.with_replay(batch, AUXILIARY, self.ratio / self.draws if self.alpha else 0.0, 0.0)
        self.matched = slice(len(batch), len(mixed))
        return self.with_replay(mixed, REPLAY, self.ratio / self.draws if self.beta else 0.0, self.beta)

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        # Current rows stand first in a mixed batch; what the model answers now is what it is held to later.
        current = self.fresh[-1]
        self.fresh[-1] = replace(current, extra=self._kept(output.logits[: len(current)].detach()))
        if self.matched.start == self.matched.stop:
            return None
        answers = output.logits[self.matched]
        if self.top_logits:
            answers = answers.gather(-1, batch.extra["places"][self.matched])
        return self.alpha * F.mse_loss(answers.float(), batch.extra["logits"][self.matched].float())

    def _kept(self, logits: Tensor) -> dict[str, Tensor]:
        """What the buffer keeps of an answer: all its logits, or the largest and their places."""
        if not self.top_logits:
            return {"logits": logits.float()}
        largest = logits.topk(self.top_logits, dim=-1)
        return {"logits": largest.values.half(), "places": largest.indices}


class DER(DERpp):
    """Dark experience replay: one draw from the buffer is held to its stored logits, and labels are not replayed.

    This is `DERpp` with `beta` 0, but for the draw, which has `ratio` rows for each current one.
    """

    knobs = ("ratio", "alpha")
    paper = "Buzzega et al. 2020, arXiv:2004.07211"
    draws = 1

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        alpha: float = 0.3,
        from_task: int = 2,
        top_logits: int | None = None,
    ) -> None:
        """`alpha` weighs the mean squared distance to stored logits; the others as in `DERpp`."""
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, alpha=alpha, beta=0.0,
            from_task=from_task, top_logits=top_logits,
        )  # fmt: skip
