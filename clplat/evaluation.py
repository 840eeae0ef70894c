"""Scoring: every task through every view, from no training randomness and with no trace left in the learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, device_of
from clplat.config import Precision
from clplat.errors import ConfigError
from clplat.hooks import Hooks
from clplat.loaders import resident
from clplat.objective import Objective
from clplat.precision import autocast
from clplat.randomness import preserved
from clplat.reading import RowReader, learns, reading
from clplat.result_table import Cell
from clplat.strategies.world import World
from clplat.streams.base import Data, EvalSet, Task, spread_rows
from clplat.streams.batch import Batch
from clplat.unchanged import Asked, Scores, Unchanged

T = TypeVar("T")


class View:
    """A learner as scorers see it (`streams.scorers.Answerer`): through one view, among the tasks seen."""

    def __init__(
        self, architecture: Architecture, objective: Objective, hooks: Hooks, seen: Sequence[int], precision: Precision
    ) -> None:
        self.architecture, self.objective, self.predictor = architecture, objective, hooks.predictor
        self.seen, self.precision = list(seen), precision
        # What was asked of the tasks seen, and what that was answered: what scores may have depended on.
        self.asked: Asked = {}

    def logits(self, batch: Batch) -> Tensor:
        if self.objective.spec.scenario == "class":
            self._ask(list)
        with self._autocast():
            if self.predictor is not None:
                return self.predictor.predict(batch)
            return self.objective.seen(self.architecture(batch), batch, self.seen)

    def prepare(self) -> None:
        """What answers need of other processes."""
        if self.predictor is not None:
            with self._autocast():
                self.predictor.prepare_predict()

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None) -> list[list[int]]:
        from clplat.architectures.generation import greedy

        with self._autocast():
            return greedy(self.architecture, prompts, max_new_tokens=max_new_tokens, stop=stop)

    def features(self, batch: Batch) -> Tensor:
        with self._autocast():
            hidden = self.architecture(batch, return_hidden="last").hidden
        if hidden is None or hidden.ndim != 2:
            raise ConfigError(
                f"architecture: {type(self.architecture).__name__} shows no features, which this stream's scores need; "
                "let its forward return Output(..., hidden=...), the inputs (B, H) of its last layer"
            )
        return hidden

    def classes_seen(self) -> list[int]:
        return self._ask(self.objective.classes_of)

    def tasks_seen(self) -> list[int]:
        return self._ask(list)

    def waits_for(self, task: int) -> bool:
        return self._ask(partial(_waiting, task))

    def _ask(self, question: Callable[[list[int]], T]) -> T:
        answer = self.asked[question] = question(self.seen)
        return answer

    def device(self) -> torch.device:
        return device_of(self.architecture)

    def reading(self, rows: int) -> AbstractContextManager[RowReader]:
        return reading(self, rows)

    def fork(self) -> View:
        """A copy whose architecture may change: for adaptive scorers."""
        forked = copy.copy(self)
        forked.architecture = copy.deepcopy(self.architecture)
        return forked

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        return autocast(self.precision, self.device())


class Evaluator:
    """Scores the tasks and probes of a stream."""

    def __init__(
        self,
        *,
        architecture: Architecture,
        objective: Objective,
        hooks: Hooks,
        tasks: Sequence[Task],
        probes: Sequence[EvalSet],
        world: World,
        batch_size: int,
        max_rows: int | None,
        precision: Precision,
    ) -> None:
        self.architecture, self.objective, self.hooks = architecture, objective, hooks
        self.max_rows = max_rows
        self.tasks, self.probes, self.world = tasks, probes, world
        self.batch_size, self.precision = batch_size, precision
        self._sets: dict[int, Data] = {}
        self._unchanged = Unchanged(hooks, single_process=world.size == 1)

    def cells(
        self, seen: Sequence[int], between: Callable[[], None] = lambda: None, *, probes: bool = True
    ) -> list[Cell]:
        """Scores of all tasks, and of the probes where not left out, for a learner trained on the tasks `seen`.

        `between` is called between sets, so that a request to stop need not wait for the whole evaluation.
        """
        found: list[Cell] = []
        with self._undisturbed():
            self._unchanged.check(self.architecture)
            for name, entered in self.hooks.views().items():
                with entered():
                    view = View(self.architecture, self.objective, self.hooks, seen, self.precision)
                    for task in self.tasks:
                        between()
                        found += self._task_cells(task, view, name)
                    for probe in self.probes if probes else ():
                        between()
                        found += self._set_cells(probe, view, name, index=None, headline=None)
        return found

    def reached(self, task: Task, thresholds: Mapping[str, float], seen: Sequence[int]) -> bool:
        """Whether every metric of `thresholds` on the task's validation set is as good as its threshold."""
        assert task.val is not None, "checked when the run was assembled"
        with self._undisturbed(), self.hooks.views()["default"](), self.hooks.told(task):
            view = View(self.architecture, self.objective, self.hooks, seen, self.precision)
            scores = self._scores(task.val, view)
        kinds = task.val.scorer.metrics
        return all(
            scores[name][0] >= least if kinds[name].higher_is_better else scores[name][0] <= least
            for name, least in thresholds.items()
        )

    def probe_losses(self, seen: Sequence[int], rows: int) -> dict[str, float]:
        """Loss on the validation sets of the tasks `seen`, by name, on `rows` rows of each; for controllers."""
        found: dict[str, float] = {}
        with self._undisturbed(), self.hooks.views()["default"]():
            view = View(self.architecture, self.objective, self.hooks, seen, self.precision)
            for task in self.tasks:
                if task.index in seen:
                    assert task.val is not None, "checked when the run was assembled"
                    with self.hooks.told(task):
                        found[task.name] = self._scores(task.val, view, rows)["loss"][0]
        return found

    def _task_cells(self, task: Task, view: View, name: str) -> list[Cell]:
        headline = task.headline if task.view == name else None
        if self.objective.spec.scenario == "class" and task.index not in view.seen:
            # Its classes are not among the answers yet: a score would say nothing.
            scores = {metric: (float("nan"), float("nan"), 0.0) for metric in task.test.scorer.metrics}
            return self._as_cells(task.test, scores, name, task.name, task.index, headline)
        with self.hooks.told(task):
            return self._set_cells(task.test, view, name, index=task.index, headline=headline, label=task.name)

    def _set_cells(
        self, test: EvalSet, view: View, name: str, *, index: int | None, headline: str | None, label: str = ""
    ) -> list[Cell]:
        scores = self._unchanged.scores(test, view.seen, lambda: self._scores_and_asked(test, view))
        return self._as_cells(test, scores, name, label or test.name, index, headline)

    def _scores_and_asked(self, test: EvalSet, view: View) -> tuple[Scores, Asked]:
        """Scores, and what they may depend on of the tasks seen."""
        view.asked = {}
        scores = self._scores(test, view)
        return scores, view.asked

    def _as_cells(
        self,
        test: EvalSet,
        scores: Scores,
        view: str,
        label: str,
        index: int | None,
        headline: str | None,
    ) -> list[Cell]:
        return [
            Cell(
                view=view, metric=metric, task=label, index=index, value=value, total=total, count=count,
                higher_is_better=test.scorer.metrics[metric].higher_is_better, headline=metric == headline,
            )
            for metric, (value, total, count) in scores.items()
        ]  # fmt: skip

    def _scores(self, test: EvalSet, view: View, limit: int | None = None) -> Scores:
        """Value, sum and count of each metric, over all processes; of `limit` rows, or of as many as are scored."""
        rows = torch.arange(len(test.data))
        if not test.scorer.whole:
            rows = spread_rows(len(test.data), limit or self.max_rows)[self.world.rank :: self.world.size]
        if self.world.size > 1:
            view.prepare()
        scorer = test.scorer.learning() if learns(self.architecture) else test.scorer
        answerer = view.fork() if scorer.adaptive else view
        sums = scorer.score(answerer, self._held(test), rows, self.batch_size)
        table = torch.stack([sums[name] for name in test.scorer.metrics]).double().to(view.device())
        totals = (table if test.scorer.whole else self.world.sum(table)).cpu().tolist()
        return {
            name: (total / count if count else float("nan"), total, count)
            for name, (total, count) in zip(test.scorer.metrics, totals, strict=True)
        }

    def _held(self, test: EvalSet) -> Data:
        """The set's rows on the learner's device, where they can stay from one evaluation to the next."""
        # By identity: two tasks of a user's stream may call their sets alike.
        if id(test) not in self._sets:
            self._sets[id(test)] = resident(test.data, device_of(self.architecture))
        return self._sets[id(test)]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and every random source as it was afterwards."""
        # Each process's last forward pass has moved its own statistics of batches; the next begins with the first's.
        self.world.equalise(self.architecture.buffers())
        modes = {module: module.training for module in self.architecture.modules()}
        self.architecture.eval()
        # Not inference mode: memories that learn while they read need versioned tensors.
        with preserved(), torch.no_grad():
            try:
                yield
            finally:
                for module, training in modes.items():
                    module.training = training


def _waiting(task: int, seen: list[int]) -> bool:
    return bool(seen) and task not in seen
