"""Reference arms: nothing done against forgetting, nothing done at all, and more data than a learner may keep."""

from __future__ import annotations

from collections.abc import Sequence

from clplat.strategies.base import Strategy
from clplat.streams.base import Data, JoinedData, Task


class Naive(Strategy):
    """Train on each task in turn and do nothing else: the lower reference."""


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

    def budget_tasks(self, task: Task) -> Sequence[Task]:
        return ()
