"""Reference arms: nothing done against forgetting, nothing done at all, and more data than a learner may keep."""

from __future__ import annotations

from collections.abc import Sequence

from clplat.strategies.base import Context, Strategy
from clplat.streams.base import Data, JoinedData, Task

LEARNING = ("select_tasks", "train_data", "task_start", "batch", "objective", "penalty", "gradient", "step", "step_end")
"""Hooks of strategies that need training to have something to do."""
READING = ("views", "predict", "measurements")
"""Hooks of strategies that have something to do without it."""


def refuse_learners(strategy: Strategy, context: Context, *beside: type[Strategy]) -> None:
    """ValueError where another strategy of the run would have nothing to do beside `strategy`, which trains nothing;
    those of the classes `beside` have."""
    for name, other in context.strategies.items():
        reads = any(map(other.overrides, READING)) and not any(map(other.overrides, LEARNING))
        if other is not strategy and not reads and not isinstance(other, beside):
            raise ValueError(
                f"{type(strategy).__name__} trains nothing, so that strategies.{name} ({type(other).__name__}) would "
                "do nothing; leave one of the two out"
            )


class Naive(Strategy):
    """Train on each task in turn and do nothing else: the lower reference."""

    shards = True


class Cumulative(Strategy):
    """Train on all data seen so far, for each task's own budget of steps: forgets only for lack of steps."""

    reference = True

    def train_data(self, task: Task, past: Sequence[Task]) -> Data:
        return JoinedData([*(earlier.train for earlier in past), task.train])


class Joint(Strategy):
    """Train once on the data of all tasks together, with the budgets of all of them: the upper reference."""

    reference = True

    def select_tasks(self, tasks: Sequence[Task]) -> Sequence[Task]:
        return tasks[-1:]

    def budget_tasks(self, task: Task) -> Sequence[Task]:
        return self.context.tasks

    def train_data(self, task: Task, past: Sequence[Task]) -> Data:
        return JoinedData([each.train for each in self.context.tasks])


class ZeroShot(Strategy):
    """Train nothing: every row of the table is row 0, the model as it came."""

    reference = True
    trains = False

    def setup(self, context: Context) -> None:
        super().setup(context)
        refuse_learners(self, context)

    def budget_tasks(self, task: Task) -> Sequence[Task]:
        return ()
