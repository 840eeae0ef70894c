"""Replay under an asymmetric cross-entropy: new classes do not push old ones out of the way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.class_tables import classes_seen
from clplat.strategies.replay import ExperienceReplay
from clplat.streams.batch import CURRENT, IGNORE, Batch


class ERACE(ExperienceReplay):
    """Experience replay with asymmetric cross-entropy: current rows are told apart from each other alone.

    In a batch with replayed rows the softmax of a current row runs over the classes of the batch's current rows, so
    that its gradient lowers the logits of no earlier class; that of a replayed row runs over all classes seen so far.
    Batches without replayed rows keep the run's default loss. Each process looks at its own rows.
    """

    paper = "Caccia et al. 2022, arXiv:2104.05025"
    fidelity = "exact"

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.seen = classes_seen(context, "ERACE")

    def objective(self, output: Output, batch: Batch) -> Tensor:
        if batch.origin is None:
            return self.context.loss(output, batch)
        assert self.context.task is not None
        current = batch.origin == CURRENT
        counted = (current & (batch.targets != IGNORE)).float()
        present = counted.new_zeros(output.logits.shape[-1]).index_add(0, batch.targets.clamp(min=0), counted) > 0
        among = torch.where(current.unsqueeze(1), present, self.seen[self.context.task.index])
        logits = output.logits.masked_fill(~among, float("-inf"))
        return self.context.loss(replace(output, logits=logits), batch)
