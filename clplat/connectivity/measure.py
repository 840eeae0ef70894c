"""The losses at a place of a line, on the sets that a pair of tasks is judged by."""

from __future__ import annotations

import torch

from clplat.assembly import Parts
from clplat.config import RunConfig
from clplat.connectivity.lines import Losses
from clplat.loaders import resident
from clplat.precision import autocast
from clplat.streams.base import Data, spread_rows
from clplat.streams.batch import IGNORE


class Measure:
    """Mean losses of the model as it is, on the sets that a pair of tasks is judged by."""

    def __init__(self, parts: Parts, config: RunConfig, rows: int) -> None:
        self.model, self.objective, self.device = parts.architecture, parts.evaluator.objective, parts.device
        self.precision, self.at_once, self.rows = config.training.precision, config.evaluation.batch_size, rows
        self.tasks = {task.index: resident(task.test.data, parts.device) for task in parts.stream.tasks}
        language = parts.stream.spec.kind == "language"
        self.probes = [resident(probe.data, parts.device) for probe in parts.stream.probes if language]

    def __call__(self, first: int, second: int) -> Losses:
        found = {index: self.loss(data) for index, data in self.tasks.items() if index <= second}
        earlier = [value for index, value in found.items() if index <= first]
        sets = {"earlier": earlier, "later": [found[second]], "seen": list(found.values())}
        if self.probes:
            sets["general"] = [self.loss(probe) for probe in self.probes]
        return {name: sum(values) / len(values) for name, values in sets.items()}

    @torch.no_grad()
    def loss(self, data: Data) -> float:
        """Nats for each prediction, over rows that are spread evenly."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for rows in spread_rows(len(data), self.rows).split(self.at_once):
            batch = data.batch(rows).to(self.device)
            with autocast(self.precision, self.device):
                output = self.model(batch)
            output.logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
            nats = self.objective.row_loss(output, batch).double().sum()
            total += torch.stack([nats, (batch.targets != IGNORE).sum().double()])
        return float(total[0] / total[1])
