"""Answers from a buffer: the class whose remembered rows are nearest in the space of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.buffers import Buffer
from clplat.strategies.class_tables import classes_seen
from clplat.strategies.weights import evaluating
from clplat.streams.batch import Batch


class NearestMean:
    """The nearest-mean classifier of iCaRL and SCR, over the rows of a buffer as the model sees them now.

    Features are the inputs of the model's last layer at unit length, and so are the means of each class's rows. Means
    are worked out when they are first asked for after a change of weights or rows; several processes, which share the
    rows, do so together.
    """

    def __init__(self, context: Context, buffer: Buffer, name: str) -> None:
        """`name` is the strategy's; raises ValueError where tasks have no classes or the model shows no features."""
        self.context, self.buffer, self.seen = context, buffer, classes_seen(context, name)
        one = context.tasks[0].train.batch(torch.tensor([0])).to(context.device())
        with torch.no_grad(), evaluating(context.architecture):
            hidden = context.architecture(one, return_hidden="last").hidden
        if hidden is None or hidden.ndim != 2:
            raise ValueError(f"{name}: {type(context.architecture).__name__} shows no features; let its forward return "
                             "Output(..., hidden=...), the inputs (B, H) of its last layer")  # fmt: skip
        self._of: tuple[int, list[tuple[int, int]]] = (0, [])
        self._means = (hidden, hidden)

    def logits(self, batch: Batch) -> Tensor:
        """Minus the squared distance to each class's mean, (B, C); a class without rows stands as far as can be.

        Classes that the scenario hides are at minus infinity. While nothing is stored, the model's own logits.
        """
        output = self.context.architecture(batch, return_hidden="last")
        scores = output.logits
        if len(self.buffer):
            means, known = self.means()
            # `cdist` stays in float32 under mixed precision, where a product would be rounded to 16 bits.
            scores = torch.where(known, -torch.cdist(unit_length(output), means).square(), -4.0)
        return self.among_seen(scores, batch)

    def among_seen(self, scores: Tensor, batch: Batch) -> Tensor:
        """Scores (B, C) with those of classes that the scenario hides at minus infinity."""
        if self.context.spec.scenario == "class" and self.context.task is not None:
            scores = scores.masked_fill(~self.seen[self.context.task.index], float("-inf"))
        return self.context.masked(Output(logits=scores), batch)

    def prepare(self) -> None:
        """Work the means out where that is due; all processes together, of which some may have nothing to answer."""
        if len(self.buffer):
            self.means()

    def means(self) -> tuple[Tensor, Tensor]:
        """The mean of each class's features (C, H), and which classes have rows (C,)."""
        # A tensor's version counts its changes in place: training, and views that put other weights in.
        weights = [(p.data_ptr(), p._version) for p in self.context.architecture.parameters()]
        if (self.buffer.seen, weights) != self._of:
            self._of, self._means = (self.buffer.seen, weights), self._measured()
        return self._means

    def _measured(self) -> tuple[Tensor, Tensor]:
        classes = self.context.spec.num_outputs
        found, labels = [], []
        # In parts, so that where several processes share the buffer none ever has more rows of the others.
        for start in range(0, len(self.buffer), 256):
            part = self.buffer.batch(slice(start, start + 256))
            found.append(unit_length(self.context.architecture(part, return_hidden="last")))
            labels.append(part.targets)
        features, targets = torch.cat(found), torch.cat(labels)
        sums = features.new_zeros(classes, features.shape[1]).index_add(0, targets, features)
        return F.normalize(sums), targets.bincount(minlength=classes) > 0


def unit_length(output: Output) -> Tensor:
    """The features (B, H) of an output at unit length, in float32 at least."""
    assert output.hidden is not None
    return F.normalize(output.hidden.to(torch.promote_types(output.hidden.dtype, torch.float32)))
