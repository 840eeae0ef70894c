"""What a strategy is: a plain class whose hooks the learner calls; every hook is optional.

Only hooks that a class overrides are called, so a strategy that does nothing costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, Output, StepOutcome
from clplat.strategies.world import World
from clplat.streams.base import Data, Spec, Task
from clplat.streams.batch import Batch

Fixed = Literal["nothing", "trained", "everything"]
"""What of a model must keep its shape from task to task: its trained weights, or all that its state holds."""

Hidden = Literal["last", "all"]
"""Hidden states to ask a model for: the input of its head (B, T, C), or that of all layers (B, L + 1, T, C)."""

Fidelity = Literal["exact", "mechanism", "interpretation", "standard"]
"""How close a component is to its paper; standard where there is no paper to follow."""


@dataclass(kw_only=True)
class Context:
    """What a strategy may see of the run; the same object for all strategies of a run.

    `generator` is the run's `strategy` random source (CPU), equal on all processes. `loss(output, batch)` is the
    default objective: Σ over origins of weight × mean cross-entropy. `row_loss` gives it unreduced, (B,) or
    (B, T), 0 where ignored. `logits(batch)` forwards and hides the classes that the scenario hides.
    `batches(data, batch_size)` walks a set once, in order, on the learner's device. `tasks` are all of the
    stream, `task` is the current one (None before the first), `past` those already trained on, `step` the
    optimizer steps done in the run. `optimizer()` is the one that trains the current task, while it trains.
    `strategies` are all of the run by name, of which some may not be set up yet.
    """

    architecture: Architecture
    spec: Spec
    tasks: Sequence[Task]
    world: World
    generator: torch.Generator
    loss: Callable[[Output, Batch], Tensor]
    row_loss: Callable[[Output, Batch], Tensor]
    masked: Callable[[Output, Batch], Tensor]
    batches: Callable[[Data, int], Iterator[Batch]]
    batch_size: int
    device: Callable[[], torch.device]
    optimizer: Callable[[], torch.optim.Optimizer]
    task: Task | None = None
    past: Sequence[Task] = ()
    step: int = 0
    strategies: Mapping[str, Strategy] = field(default_factory=dict)


class Strategy:
    """Base class with the hooks in the order in which they are called.

    Class attributes: `knobs`, the numeric attributes that a controller may set while the run goes on;
    `reference`, True for arms that are no continual learners, but something to compare them with: they see more data
    (joint, cumulative), are told more (an adapter for each task), or train nothing;
    `replays`, True where rows of earlier tasks are stored; `restarts`, True where every task begins from the initial
    weights; `own_weights`, what the model's weights are called where a strategy keeps others beside them; `trains`,
    False where no weight is ever moved; `begins_memories`, True where side memories are begun; `fixed`, what of the
    model must not grow from task to task; `shards`, True where a process may hold a share of the weights alone while a
    task is trained (not inherited: a subclass says so for itself); `hidden`, what the training's forward pass shows to
    `penalty` in `output.hidden`: the head's input, or every layer; `paper`; `fidelity` to it.
    `context` is there from `setup` on.
    """

    knobs: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    own_weights: ClassVar[str] = ""
    trains: ClassVar[bool] = True
    begins_memories: ClassVar[bool] = False
    fixed: ClassVar[Fixed] = "nothing"
    shards: ClassVar[bool] = False
    hidden: Hidden | None = None
    paper: ClassVar[str] = ""
    fidelity: ClassVar[Fidelity] = "standard"
    context: Context

    def setup(self, context: Context) -> None:
        """Once, before anything else; check here what can only be known with model and stream at hand."""
        self.context = context

    def select_tasks(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks that training passes through; joint training passes through the last alone."""
        return tasks

    def train_data(self, task: Task, past: Sequence[Task]) -> Data:
        """The rows to train on; `task.train` unless a reference arm says otherwise."""
        return task.train

    def budget_tasks(self, task: Task) -> Sequence[Task]:
        """The tasks whose budgets are spent now; joint training spends those of all tasks at once."""
        return (task,)

    def task_start(self, task: Task) -> None:
        """A task begins; called once, also when the run was interrupted inside the task."""

    def batch(self, batch: Batch) -> Batch:
        """Change the batch before the forward pass: mix in replay, with origins and weights set."""
        return batch

    def objective(self, output: Output, batch: Batch) -> Tensor:
        """Replace the default loss; at most one strategy of a run may."""
        return self.context.loss(output, batch)

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        """A scalar added to the loss, or None."""
        return None

    def gradient(self) -> None:
        """Change `.grad` in place: after all-reduce and unscaling, before clipping."""

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Output]:
        """Own the whole optimizer step; its loss, and the output that it was measured on. At most one of a run may."""
        raise TypeError(f"{type(self).__name__} does not own the step")

    def step_end(self, outcome: StepOutcome) -> None:
        """An optimizer step is done."""

    def task_end(self, task: Task) -> None:
        """A task is trained: consolidate, snapshot, estimate importances, fill buffers."""

    def predict(self, batch: Batch) -> Tensor:
        """Answer with something else than the model's own logits (for example the nearest mean)."""
        raise TypeError(f"{type(self).__name__} does not predict")

    def prepare_predict(self) -> None:
        """Bring about what `predict` needs of other processes. Where several score a set each calls this first, under
        what it is scored under, since one whose share of the set is empty may not call `predict`."""

    def views(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        """Further ways to answer: by name a context manager within which the architecture is changed. The name
        `default` is not a further one, but stands for how the learner answers when nothing else is said."""
        return {}

    def told(self, task: Task) -> AbstractContextManager[None]:
        """Within it the sets of `task` are scored, by a learner that may know whose they are: for arms with task
        identity (task-incremental). `task` may be one that is not trained yet; probes belong to none."""
        return nullcontext()

    def signals(self) -> Mapping[str, float]:
        """Numbers about itself that controllers may steer by, the same on all processes; asked for at their events
        alone, so that it may wait for the device. Changes nothing."""
        return {}

    def measurements(self) -> Mapping[str, float]:
        """Numbers about itself that are worth a curve, `strategy/STRATEGY/NAME` in the record; asked for at task
        boundaries only, so that it may wait for the device. Changes nothing."""
        return {}

    def stored_bytes(self) -> int:
        """Bytes kept for rows of earlier tasks (samples, tokens, stored logits), by all processes together: the replay
        budget. The first process alone may ask."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive an interruption: tensors and plain data, the same on all processes and whole.

        All of them ask at once, so that what they share can be brought together, though the first alone writes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def overrides(self, hook: str) -> bool:
        """Whether this class defines `hook` itself."""
        return getattr(type(self), hook) is not getattr(Strategy, hook)
