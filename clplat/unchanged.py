"""What a frozen arm need not score again: sets whose scores cannot have changed since they were scored.

An arm that trains nothing (`Truncation`, `ZeroShot`) has the same numbers in every row of its table. Scoring it anew
after each task took twice as long as its reading; taken from the first row they are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from clplat.hooks import Hooks
from clplat.streams.base import EvalSet, digest

OTHERWISE = ("predict", "told", "views")
"""Hooks through which a strategy may answer otherwise than the model, and differently from task to task."""
Scores = dict[str, tuple[float, float, float]]
Asked = dict[Callable[[list[int]], Any], Any]
"""Questions about the tasks seen, and their answers."""


class Unchanged:
    """Scores of sets by what they depend on: the set, and for scorers that ask about the tasks seen, the answers.

    Kept where a strategy says that nothing is trained, and no other has views or predictions of its own, which
    may change without a weight. Forgotten as soon as a tensor of the model differs. Not in checkpoints: a
    resumed run scores again, and finds the same.
    """

    def __init__(self, hooks: Hooks, *, single_process: bool) -> None:
        frozen = any(not strategy.trains for strategy in hooks.strategies.values())
        answers = any(any(map(s.overrides, OTHERWISE)) for s in hooks.strategies.values())
        # Of several processes one might score a set while another, waiting for its sums, does not.
        self.possible = single_process and frozen and not answers
        self._fingerprint = ""
        self._found: dict[int, list[tuple[Scores, Asked]]] = {}

    def check(self, model: nn.Module) -> None:
        """Forget everything if the model is another than when it was last scored."""
        if not self.possible:
            return
        # Also of a backbone, and of buffers that checkpoints leave out.
        fingerprint = digest(*model.parameters(), *model.buffers())
        if fingerprint != self._fingerprint:
            self._found.clear()
        self._fingerprint = fingerprint

    def scores(self, test: EvalSet, seen: list[int], measure: Callable[[], tuple[Scores, Asked]]) -> Scores:
        """Those of a set, measured if they are not known; `measure` also says what was asked about the tasks seen."""
        if not self.possible or test.scorer.adaptive:
            return measure()[0]
        known = self._found.setdefault(id(test), [])
        for scores, asked in known:
            if all(question(seen) == answer for question, answer in asked.items()):
                return scores
        known.append(measure())
        return known[-1][0]
