"""What every strategy must keep, as plain functions for tests: build it, and they drive it through a toy stream.

    def test_my_strategy_keeps_the_contract() -> None:
        check_strategy(lambda: MyStrategy(ratio=0.5), Objective, off={"ratio": 0.0})

Every check takes a function that builds the strategy and the default objective (`clplat.objective.Objective`), and
raises `AssertionError` with what is wrong.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State, StepOutcome
from clplat.strategies.base import Context, Strategy
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.world import World
from clplat.streams.base import Data, EvalSet, Spec, Task, TensorData
from clplat.streams.batch import CURRENT, Batch
from clplat.streams.scorers import Classify

Kind = Literal["classify", "language"]
Make = Callable[[], Strategy]

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

    `objective(spec, tasks)` builds the default loss. `mixed` is the last batch as it went into the model, and
    `current` as it came from the stream.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        objective: Callable[..., Any],
        kind: Kind = "classify",
        world: World | None = None,
    ) -> None:
        self.strategies = list(strategies)
        spec, tasks = toy_stream(kind)
        loss = objective(spec, tasks)
        self.architecture = ToyModel(spec)
        self.optimizer = self._new_optimizer()
        self.context = Context(
            architecture=self.architecture, spec=spec, tasks=tasks, world=world or World(),
            generator=torch.Generator().manual_seed(2), loss=loss, row_loss=loss.row_loss, masked=loss.masked,
            batches=_batches, batch_size=BATCH, device=lambda: torch.device("cpu"), optimizer=lambda: self.optimizer,
            strategies=getattr(self, "named", {}),
        )  # fmt: skip
        # Controllers first, as in the platform.
        for strategy in sorted(self.strategies, key=lambda one: not hasattr(one, "observe")):
            strategy.setup(self.context)
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
                self._follow_growth()
                for strategy in self.having("task_start"):
                    strategy.task_start(task)
            self._step(self._rows(task))
            if place == STEPS - 1:
                for strategy in self.having("task_end"):
                    strategy.task_end(task)
        return self

    def _new_optimizer(self) -> torch.optim.Optimizer:
        weights = [p for p in self.architecture.parameters() if p.requires_grad]
        return torch.optim.SGD(weights, lr=0.1, momentum=0.9)

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
            output = self.architecture(batch)
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
        torch.save(state, file)
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


def _batches(data: Data, batch_size: int) -> Iterator[Batch]:
    return (data.batch(rows) for rows in torch.arange(len(data)).split(batch_size))


def check_strategy(
    make: Make, objective: Callable[..., Any], *, off: Mapping[str, float] | None, kind: Kind = "classify"
) -> None:
    """Every check; `off` are the knobs at which the strategy does nothing (None for reference arms)."""
    check_resume(make, objective, kind)
    check_randomness(make, objective, kind)
    check_storage(make, objective, kind)
    check_knobs(make)
    if off is not None:
        check_disabled(make, objective, off, kind)
        check_composition(make, objective, kind)


def check_resume(make: Make, objective: Callable[..., Any], kind: Kind = "classify") -> None:
    """A run that is saved, rebuilt and loaded ends as one that was never interrupted, bit for bit."""
    whole = ToyRun([make()], objective, kind).train()
    for stop in (2, STEPS, STEPS + 2, 2 * STEPS):
        if stop < whole.length:
            saved = ToyRun([make()], objective, kind).train(stop).saved()
            resumed = ToyRun([make()], objective, kind).load(saved)
            assert resumed.saved() == saved, f"loading what was saved after step {stop} and saving again differs"
            assert resumed.train().saved() == whole.saved(), f"resumed after step {stop}, the run ends otherwise"


def check_randomness(make: Make, objective: Callable[..., Any], kind: Kind = "classify") -> None:
    """The strategy draws from `context.generator` alone, and twice the same run is the same."""
    before = torch.get_rng_state()
    first = ToyRun([make()], objective, kind).train().saved()
    assert torch.equal(before, torch.get_rng_state()), "drew from torch's global random source"
    torch.rand(1)
    assert ToyRun([make()], objective, kind).train().saved() == first, "the same run twice ends differently"


def check_storage(make: Make, objective: Callable[..., Any], kind: Kind = "classify") -> None:
    """After every step `stored_bytes` is what lies under `rows` in the state, and within the budget; 0 if none are."""
    strategy = make()
    run = ToyRun([strategy], objective, kind)
    for step in range(1, run.length + 1):
        run.train(step)
        stored, rows = strategy.stored_bytes(), list(_under_rows(strategy.state_dict()))
        actual = sum(tensor.nbytes for tensor in rows)
        assert stored == actual, f"stored_bytes says {stored}; the state holds {actual} bytes of rows"
        capacity, capacity_bytes = (getattr(strategy, n, None) for n in ("capacity", "capacity_bytes"))
        assert capacity is None or all(len(tensor) <= capacity for tensor in rows), f"more than {capacity} rows"
        assert capacity_bytes is None or stored <= capacity_bytes, f"{stored} bytes are more than {capacity_bytes}"
    assert bool(strategy.stored_bytes()) == strategy.replays, "`replays` must say whether rows are stored"


def _under_rows(state: Any, inside: bool = False) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield from [state] if inside else []
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _under_rows(value, inside or key == "rows")
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _under_rows(value, inside)


def check_knobs(make: Make) -> None:
    """What a controller may set is there, and is a number."""
    strategy = make()
    for knob in strategy.knobs:
        assert isinstance(getattr(strategy, knob), (int, float)), f"the knob {knob!r} is no number"


def check_disabled(
    make: Make, objective: Callable[..., Any], off: Mapping[str, float], kind: Kind = "classify"
) -> None:
    """With its knobs at `off` the strategy changes no bit of the weights, and makes no batch larger."""
    strategy = make()
    for knob, value in off.items():
        setattr(strategy, knob, value)
    with_it, without = ToyRun([strategy], objective, kind), ToyRun([], objective, kind)
    for step in range(1, without.length + 1):
        with_it.train(step)
        assert len(with_it.mixed) == BATCH, f"at {dict(off)} it still adds rows"
    weights = without.train().weights()
    for name, tensor in with_it.weights().items():
        assert torch.equal(tensor, weights[name]), f"at {dict(off)} it still changes {name}"


def check_composition(make: Make, objective: Callable[..., Any], kind: Kind = "classify") -> None:
    """Before or after experience replay both add what they add alone, and current rows keep their place and origin."""
    alone = ToyRun([make()], objective, kind)
    replay = ToyRun([_replay()], objective, kind)
    both = [ToyRun(pair, objective, kind) for pair in ([make(), _replay()], [_replay(), make()])]
    for step in range(1, alone.length + 1):
        added = sum(len(run.train(step).mixed) - BATCH for run in (alone, replay))
        for run in (alone, *(pair.train(step) for pair in both)):
            kept = run.mixed.rows(slice(0, BATCH))
            assert torch.equal(kept.inputs, run.current.inputs), "current rows must stay, and stand first"
            assert kept.origin is None or bool((kept.origin == CURRENT).all()), "current rows must stay CURRENT"
        for pair in both:
            assert len(pair.mixed) - BATCH == added, "beside experience replay another number of rows is added"
    for pair in both:
        finite = all(bool(tensor.isfinite().all()) for tensor in pair.weights().values())
        assert finite, "beside experience replay weights diverge"


def _replay() -> ExperienceReplay:
    return ExperienceReplay(capacity=6, ratio=0.5)
