"""Replay under a contrastive loss, with answers from the nearest class mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.buffers import Policy
from clplat.strategies.nearest_mean import NearestMean
from clplat.strategies.replay import ExperienceReplay, current_rows
from clplat.streams.batch import AUXILIARY, REPLAY, Batch


class SCR(ExperienceReplay):
    """Supervised contrastive replay: rows of one class are drawn together in features, and classes apart.

    The model's last layer is the projection on whose outputs the loss is taken; its own inputs are the features in
    which the nearest mean of the buffer's rows answers. So no layer favours the classes that came last.
    """

    knobs = ("ratio", "temperature")
    paper = "Mai et al. 2021, arXiv:2103.13885"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        temperature: float = 0.1,
        second_view: bool = True,
        from_task: int = 1,
    ) -> None:
        """`temperature` divides the cosines. With `second_view` every row is in the batch twice, and a stream that
        augments shows it in two ways, as in the paper; without augmentation both are the same, and False costs half.
        The paper replays 100 rows beside 10 (`ratio` 10). The others as in `ExperienceReplay`."""
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, from_task=from_task
        )
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.temperature, self.second_view = temperature, second_view

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.refuse_fewer_rows_than_classes(self.buffer.capacity)
        self.nearest = NearestMean(context, self.buffer, "SCR")

    def batch(self, batch: Batch) -> Batch:
        self.fresh.append(current_rows(batch))
        mixed, again = self.with_replay(batch, REPLAY, self.ratio, self.weight), self.fresh[-1]
        if len(mixed) > len(batch):
            again = again.joined(mixed.rows(slice(len(batch), None)))
        return mixed.joined(again.with_origin(AUXILIARY, 0.0)) if self.second_view else mixed

    def objective(self, output: Output, batch: Batch) -> Tensor:
        return supervised_contrastive(output.logits, batch.targets, self.temperature)

    def prepare_predict(self) -> None:
        self.nearest.prepare()

    def predict(self, batch: Batch) -> Tensor:
        return self.nearest.logits(batch)


def supervised_contrastive(projected: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """− mean_i mean_{p: y_p = y_i} log (exp(z_i·z_p/τ) / Σ_{j≠i} exp(z_i·z_j/τ)), a scalar, over N ≥ 2 rows.

    `projected` (N, D) is brought to unit length; rows whose class has no other row are left out of the mean.
    """
    z = F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # 16 bits would round cosines before they are spread by 1/τ
        cosines = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    share = cosines - cosines.logsumexp(1, keepdim=True)
    positive = (targets.unsqueeze(0) == targets.unsqueeze(1)) & ~itself
    count = positive.sum(1)
    rows = torch.where(positive, share, 0.0).sum(1) / count.clamp(min=1)
    return -rows.sum() / (count > 0).sum().clamp(min=1)
