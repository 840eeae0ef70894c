"""Small hypernetworks with two kinds of generators, and rows for them."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.architectures.base import Architecture
from clplat.architectures.hypernetwork.model import ChunkedHypernetwork, RecurrentHypernetwork
from clplat.architectures.mlp import MLP
from clplat.architectures.probing import Contract
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

SPEC = Spec(kind="classify", input_shape=(1, 4, 4), num_outputs=6, scenario="task")
HIDDEN = Spec(kind="classify", input_shape=(1, 4, 4), num_outputs=6, scenario="class")
IMAGES = Spec(kind="classify", input_shape=(3, 8, 8), num_outputs=6, scenario="task")
TASKS = Contract(factory=lambda spec: MLP(spec=spec), spec=SPEC)


def mlp(spec: Spec) -> MLP:
    return MLP(spec=spec, hidden_sizes=[12, 9])


def chunked(spec: Spec = SPEC, target=mlp, **options) -> ChunkedHypernetwork:
    torch.manual_seed(0)
    return ChunkedHypernetwork(spec=spec, target=target, **{"chunk_size": 50, **options})


def lstm(spec: Spec = SPEC, target=mlp, **options) -> RecurrentHypernetwork:
    torch.manual_seed(0)
    return RecurrentHypernetwork(spec=spec, target=target, **{"chunk_size": 50, "hidden_size": 11, **options})


def batch(spec: Spec = SPEC, rows: int = 8, task: int | Tensor = 0) -> Batch:
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(rows, *spec.input_shape, generator=draw)
    task = torch.full((rows,), task) if isinstance(task, int) else task
    return Batch(inputs=inputs, targets=torch.arange(rows) % spec.num_outputs, task=task)


def through(model: Architecture, tasks: int) -> Architecture:
    for index in range(tasks):
        model.task_start(TASKS.task(index))
    return model
