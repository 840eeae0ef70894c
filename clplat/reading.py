"""Scoring while learning: a model whose levels learn the next token reads rows, each with weights of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, LearnsNextToken
from clplat.errors import ConfigError
from clplat.hooks import Hooks
from clplat.streams.base import Task
from clplat.streams.batch import Batch

if TYPE_CHECKING:
    from clplat.evaluation import View


class RowReader:
    """Rows that a model reads (`streams.scorers.Reader`): for a level of period C, at every C-th token of a row

    θ ← θ − lr Σ ∇_θ nats          of those C tokens, all at the θ that answered them; `mean`: divided by C

    θ begins at the model's weights, which stay what they are. The sum of all rows' nats has each row's own gradient by
    its own θ, since rows do not know of each other.
    """

    def __init__(self, view: View, rows: int) -> None:
        assert isinstance(view.architecture, LearnsNextToken), "checked when the run was assembled"
        self.view, self.model, self.levels = view, view.architecture, view.architecture.next_token_levels()
        self.chunk = math.gcd(*(level.period for level in self.levels.values()))
        own = dict(view.architecture.named_parameters())
        names = [name for level in self.levels.values() for name in level.parameters]
        self.weights = {n: own[n].detach().expand(rows, *own[n].shape).clone().requires_grad_() for n in names}
        self.gathered: dict[str, Tensor] = {}

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) by the weights of now."""
        with self.model.rows_answer_by(self.weights):
            return self.view.logits(batch)

    def learn(self, nats: Tensor, tokens: int) -> None:
        """Gather the gradient of the last chunk, and let the levels step whose periods end."""
        found = torch.autograd.grad(nats, list(self.weights.values()))
        for name, gradient in zip(self.weights, found, strict=True):
            self.gathered[name] = self.gathered[name] + gradient if name in self.gathered else gradient
        for level in self.levels.values():
            if tokens % level.period:
                continue
            assert level.lr is not None
            rate = level.lr / (level.period if level.reduction == "mean" else 1)
            for name in level.parameters:
                moved = self.weights[name].detach() - rate * self.gathered.pop(name)
                self.weights[name] = moved.requires_grad_()


@contextmanager
def reading(view: View, rows: int) -> Iterator[RowReader]:
    """Within it gradients are on, and the view's model learns from rows."""
    with torch.enable_grad():
        yield RowReader(view, rows)


def learns(architecture: Architecture) -> bool:
    """Whether some of its levels learn the next token now."""
    return isinstance(architecture, LearnsNextToken) and bool(architecture.next_token_levels())


def check_learning(architecture: Architecture, hooks: Hooks, tasks: Sequence[Task]) -> None:
    """Refuse levels that learn the next token where nothing would teach them."""
    if not learns(architecture):
        return
    if hooks.predictor is not None:
        raise ConfigError(
            "architecture: a level with loss: next_token learns from the model's own answers, and a strategy "
            f"({type(hooks.predictor).__name__}) answers in its place; use loss: local"
        )
    for task in tasks:
        if task.test.scorer.learning() is task.test.scorer:
            raise ConfigError(
                f"architecture: a level with loss: next_token learns while the likelihood of a text is scored, and "
                f"task {task.name!r} is scored by {type(task.test.scorer).__name__}; use loss: local, or a stream "
                "of text that is scored by its likelihood"
            )
