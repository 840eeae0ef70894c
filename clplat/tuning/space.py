"""The `space:` of a configuration: which keys vary and over what, checked against the configuration they vary.

    space:
      training.optimizer.init_args.lr: {low: 1e-3, high: 0.5, log: true}
      strategies.replay.init_args.capacity: {low: 50, high: 400, step: 50}
      strategies.replay.init_args.policy: {choices: [reservoir, fifo]}

Keys may also stand nested. A range is one of whole numbers where its ends and the configuration's own value are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clplat.config import RunConfig, difference, flat
from clplat.errors import ConfigError, nearest
from clplat.study_file import set_key

FIELDS = ("low", "high", "log", "step", "choices")
FIXED = {
    "stream": "is what trials are measured on; scores on other streams cannot be compared",
    "tasks": "is what trials are measured on; tune.tasks says how many are tuned on",
    "evaluation": "is how trials are measured",
    "tracking": "changes no result",
    "checkpoint": "changes no result",
    "training.threads": "changes no result but in its last bit",
    "training.accelerator": "changes no result",
    "training.devices": "changes no result but in its last bits",
    "training.sharding": "changes no result but in its last bits",
    "training.workers": "changes no result",
    "seeds": "are those of the report; trials have tune.seeds",
    **dict.fromkeys(
        ("name", "launcher", "variants", "baseline", "folder", "known_good", "space", "tune"),
        "belongs to the study and is no setting of a run",
    ),
}
"""Keys that cannot be searched, and why."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; evenly in their logarithm with `log`, in multiples with `step`."""

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def distribution(self) -> Any:
        """As Optuna says it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def ends(self) -> list[Any]:
        """The values at which a component may refuse."""
        return [self.low, self.high]

    def points(self) -> list[Any]:
        """All values, for a grid."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            raise ConfigError(f"space.{self.key}: a grid needs points; give step, or choices in place of low and high")
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + number * step for number in range(count)]

    def value(self, param: Any) -> Any:
        """The configuration's value for one of Optuna's."""
        return param

    def param(self, own: Any, _: Callable[[Any], bool]) -> Any:
        """The configuration's own value, which the search must hold too."""
        kept = f"space.{self.key}: the configuration's own value {own!r}"
        if isinstance(own, bool) or not isinstance(own, int | float):
            raise ConfigError(f"{kept} is no number; set the key to where the search should start")
        off = (own - self.low) / self.step if self.step else 0.0
        if not self.low <= own <= self.high or abs(off - round(off)) > 1e-6:
            multiples = f" in steps of {self.step:g}" if self.step else ""
            raise ConfigError(
                f"{kept} lies outside {self.low:g} to {self.high:g}{multiples}; the search begins with it, and must be "
                "able to answer that it is best: widen the range, or change the value"
            )
        return int(own) if self.whole else float(own)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A list of values: numbers, words, components or anything else that a key takes."""

    key: str
    values: tuple[Any, ...]

    def distribution(self) -> Any:
        """As Optuna says it, which knows plain values alone: others are their JSON text."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([_plain(value) for value in self.values])

    def ends(self) -> list[Any]:
        """All of them: each may be refused."""
        return list(self.values)

    def points(self) -> list[Any]:
        return list(self.values)

    def value(self, param: Any) -> Any:
        return next(value for value in self.values if _plain(value) == param)

    def param(self, own: Any, is_own: Callable[[Any], bool]) -> Any:
        """The choice that is the configuration's own value; `is_own` tells it where it is written another way."""
        for value in self.values:
            if value == own or (isinstance(value, Mapping | list) and is_own(value)):
                return _plain(value)
        raise ConfigError(
            f"space.{self.key}: the configuration's own value {own!r} is not among the choices; the search begins with "
            "it, and must be able to answer that it is best: add it, or change the value"
        )


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, Mapping | list) else value


class Space:
    """The dimensions of a search, and the point that is the configuration's own."""

    def __init__(self, given: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        """`given` is the `space:` as written, `base` the plain data of the configuration that it varies."""
        self.base = base
        self.dimensions = dimensions_of(given, lambda key: _own_value(key, base))

    def distributions(self) -> dict[str, Any]:
        """What Optuna draws from, by key."""
        return {key: dimension.distribution() for key, dimension in self.dimensions.items()}

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration's values for what Optuna has drawn."""
        return {key: dimension.value(params[key]) for key, dimension in self.dimensions.items()}

    def default(self, resolve: Callable[[Mapping[str, Any]], RunConfig]) -> dict[str, Any]:
        """The configuration's own point in Optuna's values; `resolve` gives the run that values of the space mean."""
        own = resolve({})
        found: dict[str, Any] = {}
        for key, dimension in self.dimensions.items():

            def same(value: Any, key: str = key) -> bool:
                return not difference(own, resolve({key: value}))

            found[key] = dimension.param(_own_value(key, self.base), same)
        return found

    def corners(self) -> dict[str, dict[str, Any]]:
        """Points at which a component may refuse, by a name: each end alone, and all low and all high ends together."""
        found = {f"space.{key} = {value}": {key: value} for key, d in self.dimensions.items() for value in d.ends()}
        if len(self.dimensions) > 1:
            found["all low ends of the space"] = {key: d.ends()[0] for key, d in self.dimensions.items()}
            found["all high ends of the space"] = {key: d.ends()[-1] for key, d in self.dimensions.items()}
        return found

    def grid(self) -> list[dict[str, Any]]:
        """Every point of the grid in Optuna's values."""
        sides = [[_plain(value) for value in dimension.points()] for dimension in self.dimensions.values()]
        if math.prod(map(len, sides)) > 2_000:
            raise ConfigError(
                f"space: its grid has {math.prod(map(len, sides)):,} points; use the sampler tpe or random"
            )
        return [dict(zip(self.dimensions, point, strict=True)) for point in itertools.product(*sides)]

    def changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by dotted key as a variant says them: nested, lists whole."""
        data = json.loads(json.dumps(self.base))
        found: dict[str, Any] = {}
        for key, value in values.items():
            set_key(data, key, value)
        for key, value in values.items():
            path, place = key.split("."), data
            for depth, part in enumerate(path):
                place = place[part]
                if isinstance(place, list):
                    path, value = path[: depth + 1], place
                    break
            set_key(found, ".".join(path), value)
        return found


def dimensions_of(given: Mapping[str, Any], own: Callable[[str], Any]) -> dict[str, Range | Choices]:
    """The dimensions of a `space:` as written, by key; `own` gives the configuration's own value of a key."""
    if not given:
        raise ConfigError("space: is empty; name the keys to vary, each with {low, high} or {choices} (docs/tuning.md)")
    found = {}
    for key, fields in _written(given).items():
        for prefix, why in FIXED.items():
            if f"{key}.".startswith(f"{prefix}."):
                raise ConfigError(f"space.{key}: {why}; leave it out of the space")
        found[key] = _dimension(key, fields, own(key))
    return found


def _written(given: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Ranges by dotted key, from keys that are dotted, nested or both; what is said of one twice is joined."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        key = f"{prefix}{name}"
        if not isinstance(value, Mapping) or not value:
            raise ConfigError(f"space.{key}: expected {{low, high}} or {{choices}}, got {value!r}")
        inner = {key: dict(value)} if any(name in FIELDS for name in value) else _written(value, f"{key}.")
        for one, fields in inner.items():
            found[one] = found.get(one, {}) | fields
    return found


def _own_value(key: str, base: Mapping[str, Any]) -> Any:
    place: Any = base
    try:
        for part in key.split("."):
            place = place[int(part)] if isinstance(place, list) else place[part]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        said = nearest(key, flat(base), listed=False) or "; `clplat show CONFIG` prints those there are"
        raise ConfigError(f"space.{key}: there is no such key{said}") from error
    return place


def _dimension(key: str, fields: Mapping[str, Any], own: Any) -> Range | Choices:
    """A range or choices from what is written under a key; errors name the key."""
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ConfigError(f"space.{key}.{unknown[0]}: there is no such key{nearest(unknown[0], FIELDS)}")
    if "choices" in fields:
        values = fields["choices"]
        if values == []:
            raise ConfigError(f"space.{key}: choices is empty; name two values or more, or leave the key out")
        if len(fields) > 1 or not isinstance(values, list):
            raise ConfigError(f"space.{key}: choices is a list of values, with no other key beside it")
        if any(value in values[:number] for number, value in enumerate(values)):
            raise ConfigError(f"space.{key}: a choice stands twice in {values}")
        return Choices(key=key, values=tuple(values))
    return _range(key, fields, own)


def _range(key: str, fields: Mapping[str, Any], own: Any) -> Range:
    numbers: dict[str, Any] = {name: fields[name] for name in ("low", "high", "step") if name in fields}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"space.{key}.{name}: must be a number, got {value!r}")
    if missing := [name for name in ("low", "high") if name not in numbers]:
        raise ConfigError(f"space.{key}: {missing[0]} is missing")
    log, step = fields.get("log", False), numbers.get("step")
    if not isinstance(log, bool):
        raise ConfigError(f"space.{key}.log: must be true or false, got {log!r}")
    if not numbers["low"] < numbers["high"]:
        raise ConfigError(f"space.{key}: low must be less than high, got {numbers['low']} and {numbers['high']}")
    if log and step is not None:
        raise ConfigError(f"space.{key}.step: does not go with log; leave one of them out")
    if log and numbers["low"] <= 0:
        raise ConfigError(f"space.{key}.low: must be above 0, since log is set; got {numbers['low']}")
    if step is not None and step <= 0:
        raise ConfigError(f"space.{key}.step: must be positive, got {step}")
    whole = all(isinstance(value, int) for value in numbers.values()) and not isinstance(own, float)
    low, high = numbers["low"], numbers["high"]
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Range(key=key, low=low, high=high, log=log, step=step, whole=whole)
