"""What `loop_overhead.py` trains: an MLP and a small Transformer on random rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture
from clplat.architectures.mlp import MLP
from clplat.architectures.transformer import Transformer
from clplat.streams.base import EvalSet, Spec, Stream, Task, TensorData
from clplat.streams.batch import Batch
from clplat.streams.scorers import Classify, Likelihood

Rows = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with its options, and how much it is trained."""

    name: str
    architecture: type[Architecture]
    options: dict[str, object]
    spec: Spec
    batch_size: int
    steps: int

    def rows(self) -> Rows:
        """One pass: random inputs and targets, equal at every call."""
        draw, count = torch.Generator().manual_seed(0), self.batch_size * self.steps
        if self.spec.kind == "language":
            text = torch.randint(self.spec.num_outputs, (count, self.spec.input_shape[0] + 1), generator=draw)
            return text[:, :-1].contiguous(), text[:, 1:].contiguous()
        images = torch.randn(count, *self.spec.input_shape, generator=draw)
        return images, torch.randint(self.spec.num_outputs, (count,), generator=draw)

    def module(self) -> Plain:
        torch.manual_seed(0)
        return Plain(self.architecture(spec=self.spec, **self.options))


class Plain(nn.Module):
    """An architecture as a module from inputs to logits, for peers that know no batches."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def forward(self, inputs: Tensor) -> Tensor:
        return self.architecture(Batch(inputs=inputs, targets=inputs)).logits


class RandomRows(Stream):
    """A workload's rows as a stream of one task."""

    def __init__(self, *, workload: str, steps: int) -> None:
        self.workload, self.steps = workload, steps

    def prepare(self) -> None:
        workload = replace(workloads(self.steps)[self.workload], steps=self.steps)
        self.spec = workload.spec
        data, few = TensorData(*workload.rows(), task=0), torch.arange(8)
        test = TensorData(data.inputs[few], data.targets[few], task=0)
        language = self.spec.kind == "language"
        scorer = Likelihood(token_bytes=torch.ones(self.spec.num_outputs)) if language else Classify()
        scored = EvalSet(name="random", data=test, scorer=scorer)
        self.tasks = [Task(index=0, name="random", train=data, test=scored, headline="loss")]


def workloads(steps: int) -> dict[str, Workload]:
    """The two models; `steps` are those of the MLP."""
    mlp = Workload(
        name="mlp",
        architecture=MLP,
        options={"hidden_sizes": [400, 400]},
        spec=Spec(kind="classify", input_shape=(1, 28, 28), num_outputs=10, scenario="domain"),
        batch_size=64,
        steps=steps,
    )
    transformer = Workload(
        name="transformer",
        architecture=Transformer,
        options={"hidden_size": 64, "num_layers": 2, "num_heads": 4},
        spec=Spec(kind="language", input_shape=(64,), num_outputs=256),
        batch_size=16,
        steps=max(1, steps // 6),
    )
    return {"mlp": mlp, "transformer": transformer}
