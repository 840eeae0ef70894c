"""What a controller is: a strategy that observes the run and asks for changes of other strategies' knobs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clplat.strategies.base import Context, Strategy


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something measured: when a task begins, every `observe_every` optimizer steps, at evaluations inside tasks, and
    at each boundary.

    `forgetting` maps the names of tasks trained so far to how far their headline score now lies below its best
    (`forgetting_max`); `loss` is the mean training loss since the last event of this kind (None but for steps).
    `signals` holds, by the name of each strategy that has any, what it says of itself (`Strategy.signals`). `probes`,
    for controllers with `probe_rows`, maps the names of the tasks trained on so far, the current one included, to the
    loss now on their validation sets.
    """

    kind: Literal["start", "step", "evaluation", "boundary"]
    step: int
    task: str
    loss: float | None = None
    forgetting: Mapping[str, float]
    signals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    probes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Action:
    """Set knob `knob` of the strategy named `strategy` in the configuration to `value`."""

    strategy: str
    knob: str
    value: float


class Controller(Strategy):
    """Base of controllers: `observe` decides; the platform applies, logs and can play back every decision.

    Controllers are set up before all other strategies, and may ask these, `context.strategies`, for what they then
    prepare.
    """

    observe_every: int = 0
    """Steps between events of kind "step"; 0 for none."""
    probe_rows: int = 0
    """Rows of each validation set whose loss is measured for "step" and "boundary" events, spread evenly; 0 for none.
    Validation sets are never reported, so that what a controller steers by is not what it is judged by."""

    def observe(self, event: Event) -> Sequence[Action]:
        """The changes that `event` calls for; an empty sequence for none."""
        raise TypeError(f"{type(self).__name__} must define observe")

    def measurements(self) -> Mapping[str, float]:
        """What the last decision came from; written down as `controller/STRATEGY/NAME` beside it."""
        return {}


class Playback(Controller):
    """Play recorded decisions back: the `decisions.jsonl` of another run, at the same steps."""

    def __init__(self, *, decisions: str) -> None:
        """`decisions` is the path of the file (one JSON object a line: kind, step, strategy, knob, value)."""
        self.decisions = decisions

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.actions = recorded_actions(self.decisions)
        self.observe_every = math.gcd(*(step for kind, step in self.actions if kind == "step"))

    def observe(self, event: Event) -> Sequence[Action]:
        return self.actions.get((event.kind, event.step), [])


def recorded_actions(path: str) -> dict[tuple[str, int], list[Action]]:
    """The decisions of a run by kind and step of their events; `path` may name variables of the environment, as
    `${HERE}`. Raises ValueError for a file that holds none."""
    import json
    import os
    from pathlib import Path

    path = os.path.expandvars(path)
    actions: dict[tuple[str, int], list[Action]] = {}
    try:
        for line in Path(path).read_text().splitlines():
            row: dict[str, Any] = json.loads(line)
            action = Action(strategy=row["strategy"], knob=row["knob"], value=row["value"])
            actions.setdefault((row["kind"], row["step"]), []).append(action)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"decisions: {path} cannot be read as a run's artifacts/decisions.jsonl ({error})") from error
    return actions
