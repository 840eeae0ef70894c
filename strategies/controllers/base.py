"""What a controller is: a strategy that observes the run and asks for changes of other strategies' knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clplat.strategies.base import Strategy


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something measured: every `observe_every` optimizer steps, at evaluations inside tasks, and at each boundary.

    `forgetting` maps the names of tasks trained so far to how far their headline score now lies below its best
    (`forgetting_max`); `loss` is the mean training loss since the last event of this kind (None at boundaries).
    """

    kind: Literal["step", "evaluation", "boundary"]
    step: int
    task: str
    loss: float | None = None
    forgetting: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Action:
    """Set knob `knob` of the strategy named `strategy` in the configuration to `value`."""

    strategy: str
    knob: str
    value: float


class Controller(Strategy):
    """Base of controllers: `observe` decides; the platform applies, logs and can play back every decision."""

    observe_every: int = 0
    """Steps between events of kind "step"; 0 for none."""

    def observe(self, event: Event) -> Sequence[Action]:
        """The changes that `event` calls for; an empty sequence for none."""
        raise TypeError(f"{type(self).__name__} must define observe")


class Playback(Controller):
    """Play recorded decisions back: the `decisions.jsonl` of another run, at the same steps."""

    def __init__(self, *, decisions: str) -> None:
        """`decisions` is the path of the file (one JSON object a line: kind, step, strategy, knob, value)."""
        self.decisions = decisions
        self._actions: dict[tuple[str, int], list[Action]] | None = None

    def observe(self, event: Event) -> Sequence[Action]:
        return self._recorded().get((event.kind, event.step), [])

    def _recorded(self) -> dict[tuple[str, int], list[Action]]:
        if self._actions is None:
            import json
            from pathlib import Path

            self._actions = {}
            for line in Path(self.decisions).read_text().splitlines():
                row: dict[str, Any] = json.loads(line)
                action = Action(strategy=row["strategy"], knob=row["knob"], value=row["value"])
                self._actions.setdefault((row["kind"], row["step"]), []).append(action)
        return self._actions
