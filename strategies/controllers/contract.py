"""What every controller must keep, as plain functions for tests: it steers a replay through the toy stream.

def test_my_controller_keeps_the_contract() -> None:
    check_controller(lambda: {"replay": ExperienceReplay(capacity=7), "mine": MyController()}, Objective)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch

from clplat.strategies.base import Strategy
from clplat.strategies.controllers.base import Controller, Event
from clplat.strategies.toy_run import STEPS, Kind, ToyRun
from clplat.strategies.world import World
from clplat.streams.batch import Batch

MakeAll = Callable[[], Mapping[str, Strategy]]


class ControlledRun(ToyRun):
    """A toy run whose controllers are told when tasks begin, every `observe_every` steps, and at boundaries.

    `decisions` are (kind, step, strategy, knob, value). `probe(name)` stands in for the loss on a validation set.
    """

    def __init__(
        self,
        strategies: Mapping[str, Strategy],
        objective: Callable[..., Any],
        kind: Kind = "classify",
        world: World | None = None,
        probe: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        super().__init__(strategies, objective, kind, world)
        self.probe = probe
        self.controllers = {name: one for name, one in self.named.items() if isinstance(one, Controller)}
        self.decisions: list[tuple[str, int, str, str, float]] = []

    def train(self, stop: int | None = None) -> ControlledRun:
        stop = self.length if stop is None else stop
        while self.context.step < stop:
            position, place = divmod(self.context.step, STEPS)
            self.context.task, self.context.past = self.path[position], self.path[:position]
            if place == 0:
                self._observe("start", self.controllers)
            super().train(self.context.step + 1)
            if place == STEPS - 1:
                self._observe("boundary", self.controllers)
        return self

    def _step(self, batch: Batch) -> None:
        super()._step(batch)
        step = self.context.step
        due = {n: c for n, c in self.controllers.items() if c.observe_every and step % c.observe_every == 0}
        self._observe("step", due)

    def _observe(self, kind: Any, controllers: Mapping[str, Controller]) -> None:
        assert self.context.task is not None
        names = [task.name for task in (*self.context.past, self.context.task)]
        for controller in controllers.values():
            event = Event(
                kind=kind, step=self.context.step, task=names[-1], forgetting=dict.fromkeys(names, 0.0),
                signals={name: s.signals() for name, s in self.named.items() if s.overrides("signals")},
                probes={n: self.probe(n) for n in names} if controller.probe_rows and kind != "start" else {},
            )  # fmt: skip
            for action in controller.observe(event):
                assert action.knob in self.named[action.strategy].knobs, f"there is no knob {action.knob}"
                setattr(self.named[action.strategy], action.knob, action.value)
                self.decisions.append((kind, event.step, action.strategy, action.knob, action.value))

    def saved(self) -> bytes:
        knobs = {name: {knob: getattr(one, knob) for knob in one.knobs} for name, one in self.named.items()}
        file = io.BytesIO()
        torch.save({"run": super().saved(), "knobs": knobs}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> ControlledRun:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        super().load(state["run"])
        for name, knobs in state["knobs"].items():
            for knob, value in knobs.items():
                setattr(self.named[name], knob, value)
        return self


def check_controller(make: MakeAll, objective: Callable[..., Any], kind: Kind = "classify") -> None:
    """It decides the same twice, draws from no global source, and a run that is saved, rebuilt and loaded ends as one
    that was never interrupted, bit for bit, with the same decisions."""
    before = torch.get_rng_state()
    whole = ControlledRun(make(), objective, kind).train()
    assert whole.decisions, "it never decided anything"
    assert torch.equal(before, torch.get_rng_state()), "drew from torch's global random source"
    torch.rand(1)
    again = ControlledRun(make(), objective, kind).train()
    assert (again.decisions, again.saved()) == (whole.decisions, whole.saved()), "the same run twice ends differently"
    for stop in (2, STEPS + 1, STEPS + 2, 2 * STEPS + 3):
        stopped = ControlledRun(make(), objective, kind).train(stop)
        resumed = ControlledRun(make(), objective, kind).load(stopped.saved())
        assert resumed.saved() == stopped.saved(), f"loading what was saved after step {stop} and saving again differs"
        assert resumed.train().saved() == whole.saved(), f"resumed after step {stop}, the run ends otherwise"
        assert stopped.decisions + resumed.decisions == whole.decisions, f"resumed after {stop}, it decides otherwise"
