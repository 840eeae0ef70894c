"""What a study file says, as typed options: read, checked, merged into one configuration per run.

The text of a field's note is its documentation; `clplat show CONFIG` prints the resolved whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from clplat.components import Component
from clplat.errors import ConfigError, nearest
from clplat.known_good import KnownGood
from clplat.launchers.options import LauncherConfig, RayConfig, SlurmConfig
from clplat.streams.budget import Budget
from clplat.tuning.options import TuneConfig
from clplat.yaml_text import BOOLEAN, parse_yaml

Precision = Literal["32-true", "tf32", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a task is trained."""

    budget: Budget = field(default_factory=lambda: Budget(epochs=1))
    """How long, each task: exactly one of steps, epochs, tokens; and `until`, see `streams.base.Budget`."""
    batch_size: int = 32
    """Current rows of one forward pass over all processes (all of a task's, if fewer); replay rows are added."""
    accumulate: int = 1
    """Forward passes an optimizer step."""
    optimizer: Component = field(
        default_factory=lambda: Component(class_path="torch.optim.AdamW", init_args={"lr": 1e-3})
    )
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether momenta live on into the next task."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after warm-up, down to zero for cosine and linear."""
    schedule_span: Literal["task", "stream"] = "task"
    """What one course of the schedule covers."""
    warmup: float = 0.0
    """Share of the span in which the learning rate rises from zero."""
    clip_norm: float | None = None
    """Largest global gradient norm, after strategies have changed the gradient."""
    precision: Precision = "32-true"
    compile: bool | Literal["reduce-overhead", "cudagraphs"] = False
    """Compile the forward pass and the loss with torch.compile; `reduce-overhead` also replays them as CUDA graphs,
    which pays where a GPU computes faster than the host can launch (one process, `accumulate` 1). `cudagraphs` records
    the kernels of a whole step as they are and replays them: loops over many small operations take minutes to compile
    and seconds to record. What cannot be replayed runs as it is, with a warning that says why."""
    threads: int = 1
    """CPU threads a process; part of the result, since sums differ in the last bit between thread counts."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    """Processes that train one run together."""
    sharding: Literal["none", "fsdp"] = "none"
    """What of the weights each process holds while a task is trained: all (DDP), or a share (FSDP)."""
    workers: int = 0
    """Loader processes; 0 slices in the training process, which is fastest for data in memory."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how tasks are scored. Every task is scored before training and after every task in any case."""

    every: int | None = None
    """Also score all tasks every so many optimizer steps inside tasks (the evaluation curve)."""
    batch_size: int = 256
    """Rows of one evaluation pass."""
    max_rows: int | None = None
    """At most so many rows of each set are scored, spread evenly over it: what one score of a task may cost."""
    probes: Literal["always", "ends"] = "always"
    """`ends` scores the stream's probes before training and after the last task alone: large ones of which only the
    change is asked for."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept on disk."""

    every_seconds: float = 60.0
    """Least time between two checkpoints; 0 saves at every step and phase."""
    snapshots: Literal["none", "boundary"] = "none"
    """`boundary` keeps the weights after every task."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the record goes."""

    uri: str = "sqlite:///mlflow.db"
    """Any MLflow tracking URI; a relative SQLite file lies in the current folder."""
    experiment: str = "clplat"
    enabled: bool = True
    """False keeps the record in the run folder alone; `clplat sync` sends it later."""
    system_metrics: bool = True
    log_every: int = 20
    """Optimizer steps whose mean is one point of a training curve."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a study and each of its runs are made of."""

    stream: Component
    tasks: int | None = None
    """The first so many tasks of the stream alone; all of them if not given."""
    architecture: Component
    strategies: dict[str, Component] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Experiment):
    """One run: one variant with one seed, everything resolved."""

    study: str
    variant: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Experiment):
    """A study: what all runs share, and what varies."""

    name: str
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    seeds: list[int] = field(default_factory=lambda: [0])
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name the keys in which a variant differs from what stands above."""
    baseline: str | None = None
    """The variant with which the report compares all others."""
    folder: str = "runs"
    """Where run folders are made."""
    known_good: dict[str, KnownGood] = field(default_factory=dict)
    """What `clplat run --best NAME` runs, by name."""
    space: dict[str, Any] = field(default_factory=dict)
    """What `clplat tune` varies: by dotted key a range or choices (docs/tuning.md)."""
    tune: TuneConfig = field(default_factory=TuneConfig)


_WANTED = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "list": "must be a list",
    "dict": "must be a mapping",
}
"""What is said for pydantic's kinds of errors, by the first word of the kind."""


def parse(cls: type, data: Mapping[str, Any]) -> Any:
    """An instance of a configuration class from plain data; errors name the key, and what was expected."""
    from pydantic import ValidationError

    _check_keys(cls, data, "")
    try:
        return _adapter(cls).validate_python(data)
    except ValidationError as error:
        raise ConfigError(_said(error.errors())) from error


@cache
def _adapter(cls: type) -> Any:
    """What validates a class; making one takes as long as reading a file."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _said(errors: list[Any]) -> str:
    """`key: what it must be, got …`; a key of which several types were tried has an error for each."""
    first = errors[0]
    tried = [one for one in errors if len(errors) > 1 and one["loc"][:-1] == first["loc"][:-1]]
    is_choice = len(tried) > 1 and all(
        re.fullmatch(r"int|float|bool|str|literal\[.*\]", str(e["loc"][-1])) for e in tried
    )
    place = ".".join(str(part) for part in (first["loc"][:-1] if is_choice else first["loc"]))
    reasons = [_WANTED.get(e["type"].partition("_")[0]) or re.sub("^Value error, |^Input ", "", e["msg"])
               for e in (tried if is_choice else [first])]  # fmt: skip
    said = " or ".join([reasons[0], *(reason.removeprefix("should be ") for reason in reasons[1:])])
    meant = nearest(str(first["input"]), re.findall(r"'([^']*)'", str([e.get("ctx") for e in errors])), listed=False)
    if first["type"] == "string_type" and isinstance(first["input"], bool):
        meant = f" ({BOOLEAN})"
    return f"{place}: {said}" + ("" if first["type"] == "value_error" else f", got {first['input']!r}{meant}")


def _check_keys(cls: type, data: Any, path: str) -> None:
    if not isinstance(data, Mapping):
        fix = f"; write {{class_path: {data}}}" if cls is Component and isinstance(data, str) else ""
        raise ConfigError(f"{path.rstrip('.') or 'configuration'}: expected a mapping, got {data!r}{fix}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{path}{key}: there is no such key{nearest(str(key), known)}")
        kind = str(known[key].type)
        if isinstance(value, bool) and ("int" in kind or "float" in kind):
            raise ConfigError(f"{path}{key}: should be a number, got {str(value).lower()}")
        nested = _NESTED.get(kind.removesuffix(" | None"))
        if nested is not None and value is not None:
            _check_keys(nested, value, f"{path}{key}.")
        elif key in _NAMED and isinstance(value, Mapping):
            for name, item in value.items():
                _check_keys(_NAMED[key], item, f"{path}{key}.{name}.")
    for name, item in known.items():
        missing = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if missing and name not in data:
            raise ConfigError(f"{path}{name}: this key is required")


_NESTED = {
    cls.__name__: cls
    for cls in (
        Component,
        Budget,
        TrainingConfig,
        EvaluationConfig,
        CheckpointConfig,
        TrackingConfig,
        LauncherConfig,
        RayConfig,
        SlurmConfig,
        TuneConfig,
    )
}

_NAMED = {"strategies": Component, "known_good": KnownGood}
"""What stands under the names of a mapping."""


def plain(value: Any) -> Any:
    """A configuration as plain data, ready for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as dotted keys; lists of plain values stay whole."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return flat(dict(enumerate(value)), prefix)
    return {prefix.rstrip("."): value}


FREE_ON_RESUME = (
    "tracking.", "checkpoint.", "evaluation.batch_size", "training.devices", "training.workers",
    "training.accelerator", "training.sharding",
)  # fmt: skip
"""Keys that change no result (or only its last bits) and may differ when a run is resumed."""


def scientific(config: RunConfig) -> dict[str, Any]:
    """The flat keys on which a run's result depends."""
    return {key: value for key, value in flat(plain(config)).items() if not key.startswith(FREE_ON_RESUME)}


def config_hash(config: RunConfig) -> str:
    """12 hex digits that identify the scientific part of a configuration."""
    text = json.dumps(scientific(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """Scientific keys in which two configurations differ, as `key: old → new`."""
    before, after = scientific(old), scientific(new)
    return [f"{k}: {before.get(k)} → {after.get(k)}" for k in sorted(before | after) if before.get(k) != after.get(k)]


def save(config: RunConfig | StudyConfig, path: Path) -> None:
    """Write a configuration as YAML that `load_run` or `load_study` reads back."""
    part = path.with_suffix(".part")  # whole or not at all: a search writes its study again for every trial
    part.write_text(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    part.replace(path)


def load_run(path: Path) -> RunConfig:
    """A run's resolved configuration."""
    return parse(RunConfig, parse_yaml(path.read_text()))
