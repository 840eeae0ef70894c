"""A toy stream, a toy model, and a run in small: where strategies are tried without Lightning, data or files."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State, StepOutcome
from clplat.strategies.base import Context, Strategy
from clplat.strategies.world import World
from clplat.streams.base import Data, EvalSet, Spec, Task, TensorData
from clplat.streams.batch import Batch
from clplat.streams.scorers import Classify

Kind = Literal["classify", "language"]

TASKS, STEPS, BATCH, ROWS = 3, 5, 4, 12
CLASSES, TOKENS, VOCABULARY = 6, 5, 7


class ToyModel(Architecture):
    """A small network on 5 numbers, or on each token alone."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Embedding(VOCABULARY, 8) if spec.kind == "language" else nn.Linear(TOKENS, 8)
            self.head = nn.Linear(8, spec.num_outputs)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        hidden = self.first(batch.inputs).tanh()
        return Output(logits=self.head(hidden), hidden=hidden)


def toy_stream(kind: Kind) -> tuple[Spec, list[Task]]:
    """Three tasks of twelve rows: two classes each, or rows of five tokens."""
    source = torch.Generator().manual_seed(1)
    tasks = []
    for index in range(TASKS):
        if kind == "language":
            text = torch.randint(VOCABULARY, (ROWS, TOKENS + 1), generator=source)
            data = TensorData(text[:, :-1], text[:, 1:].contiguous(), task=index)
        else:
            labels = torch.arange(ROWS) % 2 + 2 * index
            data = TensorData(torch.randn(ROWS, TOKENS, generator=source) + index, labels, task=index)
        classes = None if kind == "language" else (2 * index, 2 * index + 1)
        test = EvalSet(name=f"task{index}", data=data, scorer=Classify())
        tasks.append(Task(index=index, name=test.name, train=data, test=test, classes=classes, headline="loss"))
    outputs, scenario = (VOCABULARY, None) if kind == "language" else (CLASSES, "class")
    return Spec(kind=kind, input_shape=(TOKENS,), num_outputs=outputs, scenario=scenario), tasks  # type: ignore[arg-type]


class ToyRun:
    """A run in small: calls the hooks of its strategies in the learner's order, five steps a task.

    `objective(spec, tasks)` builds the default loss, `model(spec)` the architecture (default: `ToyModel`). `mixed` is
    the last batch as it went into the model, and `current` as it came from the stream.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy] | Mapping[str, Strategy],
        objective: Callable[..., Any],
        kind: Kind = "classify",
        world: World | None = None,
        model: Callable[[Spec], Architecture] | None = None,
    ) -> None:
        self.named = dict(strategies if isinstance(strategies, Mapping) else zip(map(str, count()), strategies))
        self.strategies = list(self.named.values())
        spec, tasks = toy_stream(kind)
        loss = objective(spec, tasks)
        self.architecture = (model or ToyModel)(spec)
        self.context = Context(
            architecture=self.architecture, spec=spec, tasks=tasks, world=world or World(),
            generator=torch.Generator().manual_seed(2), loss=loss, row_loss=loss.row_loss, masked=loss.masked,
            batches=_batches, batch_size=BATCH, device=lambda: torch.device("cpu"), optimizer=lambda: self.optimizer,
            strategies=self.named,
        )  # fmt: skip
        # Controllers first, as in the platform.
        for strategy in sorted(self.strategies, key=lambda one: not hasattr(one, "observe")):
            strategy.setup(self.context)
        self.hidden = next((one.hidden for one in self.strategies if one.hidden is not None), None)
        self.optimizer = self._new_optimizer()
        self.path: Sequence[Task] = tasks
        for strategy in self.having("select_tasks"):
            self.path = strategy.select_tasks(self.path)
        self.current = self.mixed = tasks[0].train.batch(torch.arange(0))

    @property
    def length(self) -> int:
        """Steps of the whole run."""
        return STEPS * len(self.path)

    def having(self, hook: str) -> list[Strategy]:
        return [strategy for strategy in self.strategies if strategy.overrides(hook)]

    def train(self, stop: int | None = None) -> ToyRun:
        """Go on to step `stop` of the run, or to its end."""
        while self.context.step < (self.length if stop is None else stop):
            position, place = divmod(self.context.step, STEPS)
            task = self.path[position]
            self.context.task, self.context.past = task, self.path[:position]
            if place == 0:
                self.architecture.task_start(task)
                for strategy in self.having("task_start"):
                    strategy.task_start(task)
                self._follow_growth()
            self._step(self._rows(task))
            if place == STEPS - 1:
                for strategy in self.having("task_end"):
                    strategy.task_end(task)
                self._follow_growth()
        return self

    def _new_optimizer(self) -> torch.optim.Optimizer:
        weights = [p for p in self.architecture.parameters() if p.requires_grad]
        # As a group, which may be empty: some strategies bring what is trained when a task begins.
        return torch.optim.SGD([{"params": weights}], lr=0.1, momentum=0.9)

    def _follow_growth(self) -> None:
        """A new optimizer where the architecture trains other parameters than before."""
        trained = {p for group in self.optimizer.param_groups for p in group["params"]}
        if trained != {p for p in self.architecture.parameters() if p.requires_grad}:
            self.optimizer = self._new_optimizer()

    def _rows(self, task: Task) -> Batch:
        data: Data = task.train
        for strategy in self.having("train_data"):
            data = strategy.train_data(task, self.context.past)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.context.step))
        world = self.context.world
        return data.batch(order[: BATCH * world.size][world.rank :: world.size])

    def _step(self, batch: Batch) -> None:
        self.current = batch
        for strategy in self.having("batch"):
            batch = strategy.batch(batch)
        self.mixed = batch
        owners = self.having("step")
        if owners:
            _, output = owners[0].step(batch, self.optimizer)
        else:
            output = self.architecture(batch, None, self.hidden)
            self._descend(output, batch)
        outcome = StepOutcome(
            step=self.context.step + 1, batch=batch, output=output,
            row_loss=lambda: self.context.row_loss(output, batch).detach(),
        )  # fmt: skip
        for strategy in self.having("step_end"):
            strategy.step_end(outcome)
        self.context.step += 1

    def _descend(self, output: Output, batch: Batch) -> None:
        owners = self.having("objective")
        loss = owners[0].objective(output, batch) if owners else self.context.loss(output, batch)
        for strategy in self.having("penalty"):
            penalty = strategy.penalty(output, batch)
            loss = loss if penalty is None else loss + penalty
        self.optimizer.zero_grad()
        loss.backward()
        for strategy in self.having("gradient"):
            strategy.gradient()
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.architecture.state_dict().items()}

    def saved(self) -> bytes:
        """Everything that a checkpoint holds, as a file."""
        file = io.BytesIO()
        state = {
            "structure": dict(self.architecture.structure()),
            "architecture": self.architecture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "strategies": [strategy.state_dict() for strategy in self.strategies],
            "generator": self.context.generator.get_state(),
            "step": self.context.step,
        }
        torch.save(_interned(state), file)
        return file.getvalue()

    def load(self, saved: bytes) -> ToyRun:
        """The inverse of `saved`, into a new run; fails on anything but tensors and plain data."""
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.architecture.restructure(state["structure"])
        self._follow_growth()
        self.architecture.load_state_dict(state["architecture"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.context.generator.set_state(state["generator"])
        self.context.step = state["step"]
        position = min(self.context.step // STEPS, len(self.path) - 1)
        self.context.task, self.context.past = self.path[position], self.path[:position]
        for strategy, own in zip(self.strategies, state["strategies"], strict=True):
            strategy.load_state_dict(own)
        return self


def _interned(value: Any) -> Any:
    """Plain data in which equal names are one object: a pickle tells a name that stands twice from two equal ones, and
    files of equal content would differ."""
    if isinstance(value, Mapping):
        return {_interned(name): _interned(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_interned, value))
    return sys.intern(value) if isinstance(value, str) else value


def _batches(data: Data, batch_size: int) -> Iterator[Batch]:
    return (data.batch(rows) for rows in torch.arange(len(data)).split(batch_size))
