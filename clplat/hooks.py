"""The strategies of a run as one: which of them has which hook, and in what order they are called."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor

from clplat.architectures.base import Output, StepOutcome
from clplat.errors import ConfigError, nearest
from clplat.strategies.base import Context, Hidden, Strategy
from clplat.strategies.controllers.base import Action, Controller
from clplat.streams.base import Data, Task
from clplat.streams.batch import Batch


class Hooks:
    """Calls every strategy that overrides a hook, in the order of the configuration."""

    def __init__(self, strategies: Mapping[str, Strategy]) -> None:
        self.strategies = dict(strategies)
        self.with_batch = self._having("batch")
        self.with_penalty = [(name, s) for name, s in self.strategies.items() if s.overrides("penalty")]
        self.with_gradient = self._having("gradient")
        self.with_step_end = self._having("step_end")
        self.objective = self._at_most_one("objective")
        self.step_owner = self._at_most_one("step")
        self.predictor = self._at_most_one("predict")
        self.data_owner = self._at_most_one("train_data")
        self.budget_owner = self._at_most_one("budget_tasks")
        self._refuse_idle_hooks()
        self._refuse_misspelled_hooks()
        self.controllers = {name: s for name, s in self.strategies.items() if isinstance(s, Controller)}

    def _having(self, hook: str) -> list[Strategy]:
        return [strategy for strategy in self.strategies.values() if strategy.overrides(hook)]

    def _at_most_one(self, hook: str) -> Strategy | None:
        owners = [name for name, strategy in self.strategies.items() if strategy.overrides(hook)]
        if len(owners) > 1:
            raise ConfigError(
                f"strategies: {' and '.join(owners)} both define `{hook}`; only one strategy of a run may"
            )
        return self.strategies[owners[0]] if owners else None

    def _refuse_idle_hooks(self) -> None:
        """Whoever owns the step computes loss and gradient itself: another strategy's part in them would be no part."""
        owner = next((name for name, strategy in self.strategies.items() if strategy is self.step_owner), None)
        for name, strategy in self.strategies.items() if owner is not None else ():
            idle = [hook for hook in ("objective", "penalty", "gradient") if strategy.overrides(hook)]
            if name != owner and idle:
                raise ConfigError(
                    f"strategies.{name}: its {' and '.join(idle)} would never be called, because strategies.{owner} "
                    f"({type(self.step_owner).__name__}) owns the optimizer step; leave one of the two out"
                )

    def _refuse_misspelled_hooks(self) -> None:
        """A method of nearly a hook's name is called by nobody: its strategy would have no effect, in silence."""
        hooks = [name for name, value in vars(Strategy).items() if callable(value) and not name.startswith("_")]
        for name, strategy in self.strategies.items():
            # What ours have beside the hooks others may take over.
            kinds = [kind for kind in type(strategy).__mro__ if issubclass(kind, Strategy)]
            ours = {method for kind in kinds if kind.__module__.startswith("clplat.") for method in vars(kind)}
            for method in {name for kind in kinds for name, value in vars(kind).items() if callable(value)} - ours:
                near = difflib.get_close_matches(method, hooks, n=1, cutoff=0.9)
                if near and not method.startswith("_"):
                    raise ConfigError(
                        f"strategies.{name}: {type(strategy).__name__}.{method} is no hook and would never be called; "
                        f"call it {near[0]}, or _{method} if it is a method of your own"
                    )

    def setup(self, context: Context) -> None:
        """Give every strategy its context; their objections become configuration errors that name them."""
        context.strategies = self.strategies
        # Controllers first: they may ask other strategies for what these then prepare.
        for name, strategy in sorted(self.strategies.items(), key=lambda item: item[0] not in self.controllers):
            try:
                strategy.setup(context)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"strategies.{name}: {error}") from error

    def select_tasks(self, tasks: Sequence[Task]) -> Sequence[Task]:
        for strategy in self._having("select_tasks"):
            tasks = strategy.select_tasks(tasks)
        return tasks

    def train_data(self, task: Task, past: Sequence[Task]) -> Data:
        return self.data_owner.train_data(task, past) if self.data_owner else task.train

    def budget_tasks(self, task: Task) -> Sequence[Task]:
        return self.budget_owner.budget_tasks(task) if self.budget_owner else (task,)

    def task_start(self, task: Task) -> None:
        for strategy in self._having("task_start"):
            strategy.task_start(task)

    def batch(self, batch: Batch) -> Batch:
        for strategy in self.with_batch:
            batch = strategy.batch(batch)
        return batch

    def penalties(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The penalties that apply, by strategy name."""
        found = ((name, strategy.penalty(output, batch)) for name, strategy in self.with_penalty)
        return {name: value for name, value in found if value is not None}

    def step_end(self, outcome: StepOutcome) -> None:
        for strategy in self.with_step_end:
            strategy.step_end(outcome)

    def task_end(self, task: Task) -> None:
        for strategy in self._having("task_end"):
            strategy.task_end(task)

    def views(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """The ways to answer by name, `default` first; refuses two strategies that call theirs alike."""
        found: dict[str, Callable[[], AbstractContextManager[None]]] = {}
        for owner, strategy in self.strategies.items():
            for name, view in strategy.views().items():
                if name in found:
                    raise ConfigError(f"strategies.{owner}: another strategy of this run has a view {name!r} too, and "
                                      "one would hide the other; leave one of the two out")  # fmt: skip
                found[name] = view
        return {"default": found.pop("default", nullcontext)} | found

    @contextmanager
    def told(self, task: Task) -> Iterator[None]:
        """Within it the sets of `task` are scored."""
        with ExitStack() as entered:
            for strategy in self._having("told"):
                entered.enter_context(strategy.told(task))
            yield

    @cached_property
    def hidden(self) -> Hidden | None:
        """What strategies want of the activations of a training step; refuses those that want different ones."""
        wanted = {name: strategy.hidden for name, strategy in self.strategies.items() if strategy.hidden is not None}
        if len(set(wanted.values())) > 1:
            raise ConfigError(f"strategies: {' and '.join(wanted)} need different hidden states of one forward pass "
                              f"({', '.join(wanted.values())}); leave one of them out")  # fmt: skip
        return next(iter(wanted.values()), None)

    def due(self, step: int) -> dict[str, Controller]:
        """The controllers that are told of this optimizer step."""
        return {name: c for name, c in self.controllers.items() if c.observe_every and step % c.observe_every == 0}

    def signals(self) -> dict[str, Mapping[str, float]]:
        """What strategies say of themselves, by name."""
        return {name: s.signals() for name, s in self.strategies.items() if s.overrides("signals")}

    def measurements(self) -> dict[str, float]:
        """What strategies have measured; controllers' numbers stand beside their decisions instead."""
        return {
            f"strategy/{name}/{key}": value
            for name, strategy in self.strategies.items() if name not in self.controllers
            for key, value in strategy.measurements().items()
        }  # fmt: skip

    def stored_bytes(self) -> int:
        return sum(strategy.stored_bytes() for strategy in self.strategies.values())

    def apply(self, action: Action) -> None:
        """Carry out a controller's decision."""
        target = self.strategies.get(action.strategy)
        if target is None:
            raise ConfigError(
                f"a controller acts on the strategy {action.strategy!r}, which this run does not have"
                f"{nearest(action.strategy, self.strategies)}"
            )
        if action.knob not in target.knobs:
            raise ConfigError(
                f"{type(target).__name__} has no knob {action.knob!r}{nearest(action.knob, target.knobs)}"
            )
        setattr(target, action.knob, action.value)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"state": strategy.state_dict(), "knobs": {knob: getattr(strategy, knob) for knob in strategy.knobs}}
            for name, strategy in self.strategies.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, strategy in self.strategies.items():
            strategy.load_state_dict(state[name]["state"])
            for knob, value in state[name]["knobs"].items():
                setattr(strategy, knob, value)
