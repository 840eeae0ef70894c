"""Replay that follows measured forgetting: a PI law sets how much is replayed, how it weighs, and from where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from clplat.strategies.base import Context, Fidelity
from clplat.strategies.controllers.base import Action, Controller, Event, recorded_actions
from clplat.strategies.controllers.replay_law import ReplayLaw, held_means
from clplat.strategies.replay import ExperienceReplay

OUTPUTS = ("weight", "ratio", "long_share")


class ReplayController(Controller):
    """Sets `weight`, `ratio` and `long_share` of a replay strategy every so many steps, from forgetting F.

    Signal `buffer`, which needs neither tasks nor held-out data: F is the mean over replayed rows, since the last
    decision, of max(0, loss now − lowest loss so far). Signal `probe`: the mean over earlier tasks of how far the loss
    on their validation sets lies above its lowest. F goes through `ReplayLaw`. While nothing can be replayed weight and
    ratio are 0. Knobs that the strategy lacks are left out. Law, gains and controls: docs/replay_controller.md; the
    paper names the three outputs and no formula.
    """

    paper = "TRC², arXiv:2602.22479"
    fidelity: ClassVar[Fidelity] = "interpretation"

    def __init__(
        self,
        *,
        strategy: str = "replay",
        mode: Literal["pi", "p", "fixed", "random", "playback"] = "pi",
        signal: Literal["buffer", "probe"] = "buffer",
        every: int = 100,
        probe_rows: int = 64,
        law: ReplayLaw | None = None,
        mean: dict[str, float] | None = None,
        decisions: str | None = None,
    ) -> None:
        """`strategy` is the name under which the replay stands in the configuration, `every` the optimizer steps
        between decisions, `probe_rows` the rows of each validation set that signal `probe` measures. Modes: `pi`; `p`,
        without the integral; and three controls that do not look at F. `fixed` holds `mean` (by knob), `random` draws
        every decision evenly from around it, and `playback` repeats the decisions of the run whose
        artifacts/decisions.jsonl is `decisions`. In place of `mean`, `decisions` gives the first two that run's mean
        from its first replay on. Both spread whole rows so that their mean over decisions is the one that is held."""
        if mode not in ("pi", "p", "fixed", "random", "playback"):
            raise ValueError(f"mode: must be pi, p, fixed, random or playback, got {mode!r}")
        if signal not in ("buffer", "probe"):
            raise ValueError(f"signal: must be buffer or probe, got {signal!r}")
        if every < 1 or (signal == "probe" and probe_rows < 1):
            raise ValueError(f"every, probe_rows: must be positive, got {every} and {probe_rows}")
        if mode == "playback" and (decisions is None or mean is not None):
            raise ValueError("mode: playback needs decisions, the path of a decisions.jsonl, and no mean")
        if mode in ("fixed", "random") and (mean is None) == (decisions is None):
            raise ValueError(f"mode: {mode} needs a mean, or the decisions of a run whose mean it takes; give one")
        if mode in ("pi", "p") and (mean or decisions):
            raise ValueError(f"mode: {mode} decides for itself; leave mean and decisions out")
        if unknown := set(mean or {}) - set(OUTPUTS):
            raise ValueError(f"mean: there is no knob {min(unknown)!r}; there are {', '.join(OUTPUTS)}")
        self.strategy, self.mode, self.signal, self.observe_every = strategy, mode, signal, every
        self.probe_rows = probe_rows if signal == "probe" else 0
        self.law = law or ReplayLaw()
        for knob, most in (("weight", self.law.max_weight), ("ratio", self.law.max_ratio), ("long_share", 1.0)):
            if mean and knob in mean and not 0 <= mean[knob] <= most:
                raise ValueError(f"mean.{knob}: must lie between 0 and {most:g} (law.max_{knob}), got {mean[knob]}"
                                 if knob != "long_share" else
                                 f"mean.{knob}: must lie between 0 and 1, got {mean[knob]}")  # fmt: skip
        self.mean, self.decisions = mean, decisions

    def setup(self, context: Context) -> None:
        super().setup(context)
        replay = context.strategies.get(self.strategy)
        if not isinstance(replay, ExperienceReplay):
            there = ", ".join(name for name, one in context.strategies.items() if isinstance(one, ExperienceReplay))
            raise ValueError(f"strategy: {self.strategy!r} is no replay of this run; there are {there or 'none'}")
        self.outputs = [knob for knob in OUTPUTS if knob in replay.knobs]
        if replay.policy != "ring_reservoir" and "long_share" in self.outputs:
            self.outputs.remove("long_share")
        if type(replay).step_end is not ExperienceReplay.step_end and self.signal == "buffer":
            raise ValueError(f"signal: {type(replay).__name__} does not measure what it replays; use probe")
        if self.signal == "buffer" or "long_share" in self.outputs:
            replay.track_losses(self.strategy)
        rows = max(1, context.batch_size // context.world.size)
        self.pi = self.law.begun(
            outputs=self.outputs, integral=self.mode != "p", rows=rows, stay_on=self.signal == "buffer"
        )
        recorded = recorded_actions(self.decisions) if self.decisions else {}
        self.recorded = recorded if self.mode == "playback" else {}
        self.held = self.mean or (held_means(recorded, self.strategy) if recorded else {})
        self.rises = torch.zeros(2, 2, dtype=torch.float64)
        self.best: dict[str, float] = {}
        self.owed = 0.0
        self.last: dict[str, float] = {}
        # A source of its own, so that a playback, which draws nothing, leaves replay's draws as they were.
        self.draws = torch.Generator().manual_seed(context.generator.initial_seed() ^ 0x5EED)

    def observe(self, event: Event) -> Sequence[Action]:
        for task, loss in event.probes.items():
            self.best[task] = min(loss, self.best.get(task, loss))
        if event.kind == "step":
            self._update(event)
        if self.mode == "playback":
            return self.recorded.get((event.kind, event.step), [])
        if event.kind not in ("start", "step"):
            return []
        values = self._values(event.signals[self.strategy]["rows"] > 0)
        self.last |= values
        return [Action(strategy=self.strategy, knob=knob, value=value) for knob, value in values.items()]

    def _update(self, event: Event) -> None:
        """The law learns what was forgotten since the last time, where anything was measured."""
        own = event.signals[self.strategy]
        ring, long_term, both = self._from_buffer(own) if "rise_ring" in own else (None, None, None)
        forgetting = self._from_probes(event) if self.signal == "probe" else both
        self.pi.split(ring, long_term)
        if forgetting is not None:
            self.pi.update(forgetting)
            self.last |= {"F": forgetting, **self.pi.terms()}

    def _from_buffer(self, own: Mapping[str, float]) -> tuple[float | None, float | None, float | None]:
        """Mean rise of the replayed rows of ring, reservoir and both since the last time; None without any."""
        total = torch.tensor(
            [[own["rise_ring"], own["measured_ring"]], [own["rise_long"], own["measured_long"]]], dtype=torch.float64
        )
        fresh, self.rises = total - self.rises, total
        ring, long_term = fresh.tolist()
        means = [rise / rows if rows else None for rise, rows in (ring, long_term, fresh.sum(0).tolist())]
        return means[0], means[1], means[2]

    def _from_probes(self, event: Event) -> float | None:
        old = [task.name for task in self.context.past]
        rises = [max(0.0, event.probes[name] - self.best[name]) for name in old if name in event.probes]
        return sum(rises) / len(rises) if rises else None

    def _values(self, can_replay: bool) -> dict[str, float]:
        if not can_replay:
            return {knob: 0.0 for knob in self.outputs if knob != "long_share"}
        if self.mode in ("pi", "p"):
            return self.pi.values()
        chosen = {knob: value for knob, value in self.held.items() if knob in self.outputs}
        if self.mode == "random":
            limits = self.pi.limits()
            chosen = {knob: self._around(value, *limits[knob]) for knob, value in chosen.items()}
        if "ratio" in chosen:
            chosen["ratio"] = self._whole_rows(chosen["ratio"])
        return chosen

    def _around(self, mean: float, least: float, most: float) -> float:
        reach = max(0.0, min(mean - least, most - mean))
        return mean + reach * (2 * float(torch.rand((), generator=self.draws, dtype=torch.float64)) - 1)

    def _whole_rows(self, ratio: float) -> float:
        """The ratio of a whole number of rows; what is cut off or added is made up for in later decisions."""
        wanted = ratio * self.pi.rows + self.owed
        self.owed = wanted - round(wanted)
        return round(wanted) / self.pi.rows

    def measurements(self) -> Mapping[str, float]:
        return self.last

    def state_dict(self) -> dict[str, Any]:
        return {"law": self.pi.state_dict(), "rises": self.rises, "best": dict(self.best), "owed": self.owed,
                "last": dict(self.last), "draws": self.draws.get_state()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pi.load_state_dict(state["law"])
        self.rises, self.best, self.owed = state["rises"], dict(state["best"]), state["owed"]
        self.last = dict(state["last"])
        self.draws.set_state(state["draws"])
