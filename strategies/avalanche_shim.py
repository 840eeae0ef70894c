"""What Avalanche's plugins see in place of an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output
from clplat.strategies.base import Context
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class PlainModel(nn.Module):
    """The architecture as Avalanche calls a model: images in, logits out. Weights' names begin with `architecture.`"""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def forward(self, inputs: Tensor) -> Tensor:
        unlabelled = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
        return self.architecture(Batch(inputs=inputs, targets=unlabelled)).logits


class Gradients:
    """All that plugins may ask of an optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.zero_grad(set_to_none)


@dataclass
class Clock:
    """Counters with the names and the meaning of Avalanche's."""

    train_iterations: int = 0
    train_exp_counter: int = 0
    train_exp_epochs: int = 0
    train_exp_iterations: int = 0
    train_epoch_iterations: int = 0
    total_iterations: int = 0

    def step(self) -> None:
        self.train_iterations += 1
        self.train_exp_iterations += 1
        self.train_epoch_iterations += 1
        self.total_iterations += 1


class Experience:
    """A task as Avalanche calls one; all rows have task label 0, as in benchmarks without task labels."""

    task_label, task_labels = 0, [0]

    def __init__(self, task: Task) -> None:
        self.task, self.current_experience = task, task.index
        self.classes_in_this_experience = list(task.classes or ())

    @cached_property
    def dataset(self) -> Any:
        """The training rows as an Avalanche data set, on the CPU; made when a plugin first asks."""
        batch = self.task.train.batch(torch.arange(len(self.task.train))).to("cpu")
        return avalanche_dataset(batch.inputs, batch.targets)


def avalanche_dataset(inputs: Tensor, targets: Tensor) -> Any:
    """Rows in memory as Avalanche's classification data set; items are (input, target, task label 0)."""
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset
    from torch.utils.data import TensorDataset

    rows = TensorDataset(inputs, targets)
    return _make_taskaware_classification_dataset(rows, targets=targets.tolist(), task_labels=0)


class Shim:
    """The fields that plugins read of an Avalanche strategy. They may set `loss`; anything else is refused."""

    is_training, is_eval, train_epochs = True, False, 1
    owner: str
    context: Context
    model: PlainModel
    optimizer: Gradients
    clock: Clock
    experience: Experience | None
    mbatch: list[Tensor]
    mb_output: Tensor | None
    loss: Tensor

    def __init__(self, context: Context, owner: str, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        model = PlainModel(context.architecture)
        self.put(
            owner=owner, context=context, model=model, optimizer=Gradients(model), clock=Clock(), experience=None,
            mbatch=[], mb_output=None, loss=torch.zeros(()), _criterion=criterion, train_mb_size=context.batch_size,
            eval_mb_size=context.batch_size, plugins=[],
        )  # fmt: skip

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "loss":
            raise ValueError(f"{self.owner}: sets strategy.{name}, which belongs to the training loop; penalty and "
                             "gradient plugins alone run here, so write it as a strategy of your own")  # fmt: skip
        self.put(loss=value)

    def put(self, **fields: Any) -> None:
        """Set fields from our side."""
        self.__dict__.update(fields)

    def show(self, batch: Batch, output: Output | None = None) -> None:
        """Put a batch, and what the model answered, where plugins look for it."""
        labels = torch.zeros(len(batch), dtype=torch.long, device=batch.inputs.device)
        mb_output = None if output is None else output.logits
        self.put(mbatch=[batch.inputs, batch.targets, labels], mb_output=mb_output)

    def enter(self, task: Task) -> None:
        """Make `task` the current experience."""
        if self.experience is None or self.experience.task is not task:
            self.put(experience=Experience(task))

    @property
    def device(self) -> torch.device:
        return self.context.device()

    @property
    def mb_x(self) -> Tensor:
        return self.mbatch[0]

    @property
    def mb_y(self) -> Tensor:
        return self.mbatch[1]

    @property
    def mb_task_id(self) -> Tensor:
        return self.mbatch[2]


@contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """Let a plugin take gradients of its own: those of the step, and every part's mode, are back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(part, part.training) for part in model.modules()]
    model.zero_grad()
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training


def unshared(plugin: Any) -> None:
    """Give SI copies of the weights that it remembers.

    On the CPU, Avalanche 0.6.0 keeps views of the live weights there (`param.detach().cpu().flatten()`), sees no
    movement, and so every importance is 0. On a GPU the same line copies.
    """
    if hasattr(plugin, "syn_data"):
        for kept in (plugin.ewc_data[0], *plugin.syn_data.values()):
            for weights in kept.values():
                weights.data = weights.data.clone()
