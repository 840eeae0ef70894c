"""From forgetting to the amount, weight and source of replay: a PI law with anti-windup, and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clplat.strategies.controllers.base import Action


@dataclass(frozen=True, kw_only=True)
class ReplayLaw:
    """Gains and limits; forgetting F in nats, u without unit.

    F̄ ← `smoothing` F̄ + (1 − `smoothing`) F; e = F̄ − `target`; I ← clip(I + e, 0, `max_integral`);
    u = `gain` e + `integral_gain` I; weight = clip(`base_weight` + u, `min_weight`, `max_weight`);
    ratio = clip(`base_ratio` + `ratio_slope` u, 0, `max_ratio`), a share of the current rows that makes whole rows;
    long_share = clip(0.5 + 0.5 (F̄_long − F̄_ring) / (F̄_long + F̄_ring), 0.1, 0.9). I stands still while an
    output that u sets is at its limit in the direction of e. `base_weight` 0.25 and `ratio_slope` 0, which leaves the
    number of replayed rows alone, are what kept most in docs/replay_controller.md; the reconstruction had 0 and 0.25.
    At `base_weight` 0 and F below the target the weight goes to its least. With signal `buffer` the least weight is 0.1
    where `min_weight` is not given, and the least ratio one
    row: what is not replayed is not measured either, and replay would never come back. All of it is inferred.
    """

    target: float = 0.05
    gain: float = 1.0
    integral_gain: float = 0.1
    max_integral: float = 5.0
    smoothing: float = 0.8
    base_weight: float = 0.25
    min_weight: float | None = None
    max_weight: float = 2.0
    base_ratio: float = 0.125
    ratio_slope: float = 0.0
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        for name in ("gain", "integral_gain", "max_integral", "base_weight", "base_ratio", "ratio_slope", "target"):
            if getattr(self, name) < 0:
                raise ValueError(f"law.{name}: must not be negative, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"law.smoothing: must lie between 0 and 1, 1 excluded, got {self.smoothing}")
        if not 0 <= (self.min_weight or 0.0) <= self.max_weight:
            raise ValueError(f"law.min_weight, max_weight: must rise from 0, got {self.min_weight}, {self.max_weight}")
        if self.max_ratio <= 0:
            raise ValueError(f"law.max_ratio: must be positive, got {self.max_ratio}")

    def begun(self, *, outputs: Sequence[str], integral: bool, rows: int, stay_on: bool) -> RunningLaw:
        """The law at work on some outputs, for `rows` current rows a step; with `stay_on` replay never stops."""
        return RunningLaw(self, outputs=outputs, integral=integral, rows=rows, stay_on=stay_on)


class RunningLaw:
    """State of a law while a run goes on: F̄ (with its parts), e, I and u."""

    def __init__(self, law: ReplayLaw, *, outputs: Sequence[str], integral: bool, rows: int, stay_on: bool) -> None:
        self.law, self.outputs, self.rows = law, outputs, rows
        self.integral_gain = law.integral_gain if integral else 0.0
        least = (0.1 if stay_on else 0.0) if law.min_weight is None else law.min_weight
        self.least = {"weight": min(least, law.max_weight), "ratio": min(1 / rows, law.max_ratio) if stay_on else 0.0}
        self.state = dict.fromkeys(("mean", "ring", "long_term", "error", "integral", "u"), 0.0)

    def update(self, forgetting: float) -> None:
        """One step of the law."""
        law, state = self.law, self.state
        state["mean"] = self._smoothed("mean", forgetting)
        error = state["error"] = state["mean"] - law.target
        # Asked with I as it stands: an output may reach its limit, and I then goes no further.
        if not self._saturated(law.gain * error + self.integral_gain * state["integral"], error):
            state["integral"] = min(max(state["integral"] + error, 0.0), law.max_integral)
        state["u"] = law.gain * error + self.integral_gain * state["integral"]

    def split(self, ring: float | None, long_term: float | None) -> None:
        """Forgetting of ring and reservoir apart; None where none of its rows was measured."""
        for name, value in (("ring", ring), ("long_term", long_term)):
            if value is not None:
                self.state[name] = self._smoothed(name, value)

    def _smoothed(self, name: str, value: float) -> float:
        return self.law.smoothing * self.state[name] + (1 - self.law.smoothing) * value

    def _raw(self, u: float) -> dict[str, float]:
        return {"weight": self.law.base_weight + u, "ratio": self.law.base_ratio + self.law.ratio_slope * u}

    def _saturated(self, u: float, error: float) -> bool:
        """Whether an output would be at its limit in the direction of the error."""
        limits = self.limits()
        values = [(value, *limits[knob]) for knob, value in self._raw(u).items() if knob in self.outputs]
        return any(value >= most if error > 0 else value <= least for value, least, most in values)

    def limits(self) -> dict[str, tuple[float, float]]:
        """Least and most of every output."""
        return {"weight": (self.least["weight"], self.law.max_weight),
                "ratio": (self.least["ratio"], self.law.max_ratio), "long_share": (0.1, 0.9)}  # fmt: skip

    def values(self) -> dict[str, float]:
        """The outputs that there are."""
        ring, long_term, limits = self.state["ring"], self.state["long_term"], self.limits()
        apart = (long_term - ring) / (long_term + ring) if long_term + ring > 0 else 0.0
        raw = self._raw(self.state["u"]) | {"long_share": 0.5 + 0.5 * apart}
        found = {knob: min(max(raw[knob], limits[knob][0]), limits[knob][1]) for knob in self.outputs}
        if "ratio" in found:
            found["ratio"] = round(found["ratio"] * self.rows) / self.rows
        return found

    def terms(self) -> dict[str, float]:
        """F̄, e, I and u under the names of the record."""
        state = self.state
        return {"F_mean": state["mean"], "e": state["error"], "I": state["integral"], "u": state["u"]}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


def held_means(recorded: Mapping[tuple[str, int], Sequence[Action]], strategy: str) -> dict[str, float]:
    """Mean of every knob of a strategy over the steps of a recorded run, from its first replay on.

    A value counts from its step to that of the next decision; the last one as long as the one before it.
    """
    steps = sorted({step for _, step in recorded})
    values: dict[int, dict[str, float]] = {step: {} for step in steps}
    for kind in ("step", "boundary", "start"):
        for (own, step), actions in recorded.items():
            if own == kind:
                values[step] |= {action.knob: action.value for action in actions if action.strategy == strategy}
    now: dict[str, float] = {}
    sums: dict[str, float] = {}
    lengths: dict[str, int] = {}
    for place, step in enumerate(steps):
        now = now | values[step]
        length = steps[place + 1] - step if place + 1 < len(steps) else step - steps[max(0, place - 1)]
        for knob, value in now.items() if now.get("ratio", now.get("weight")) else ():
            sums[knob] = sums.get(knob, 0.0) + value * length
            lengths[knob] = lengths.get(knob, 0) + length
    if not sums:
        raise ValueError(f"decisions: the recorded run never replayed through {strategy!r}")
    return {knob: total / lengths[knob] for knob, total in sums.items() if lengths[knob]}
