"""What a study file says, as typed options: read, checked, merged into one configuration per run.

The text of a field's note is its documentation; `clplat show CONFIG` prints the resolved whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from clplat.components import Component, checked
from clplat.errors import ConfigError, nearest
from clplat.streams.base import Budget


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a task is trained."""

    budget: Budget = field(default_factory=lambda: Budget(epochs=1))
    """How long, each task: exactly one of steps, epochs, tokens; and `until`, see `streams.base.Budget`."""
    batch_size: int = 32
    """Current rows of one forward pass over all processes; replay rows are added to them."""
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
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    compile: bool = False
    """Compile the architecture with torch.compile."""
    threads: int = 1
    """CPU threads a process; part of the result, since sums differ in the last bit between thread counts."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    """Processes that train one run together."""
    workers: int = 0
    """Loader processes; 0 slices in the training process, which is fastest for data in memory."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how tasks are scored. Every task is scored before training and after every task in any case."""

    every: int | None = None
    """Also score all tasks every so many optimizer steps inside tasks (the evaluation curve)."""
    batch_size: int = 256
    """Rows of one evaluation pass."""


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
class LauncherConfig:
    """How the runs of a study are spread over this machine."""

    workers: int | Literal["auto"] = "auto"
    """Runs side by side; auto: one per GPU, or as many as cores allow."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: one variant with one seed, everything resolved."""

    study: str
    variant: str
    seed: int
    stream: Component
    architecture: Component
    strategies: dict[str, Component] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: what all runs share, and what varies."""

    name: str
    stream: Component
    architecture: Component
    strategies: dict[str, Component] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    seeds: list[int] = field(default_factory=lambda: [0])
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name the keys in which a variant differs from what stands above."""
    baseline: str | None = None
    """The variant with which the report compares all others."""
    folder: str = "runs"
    """Where run folders are made."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everywhere else."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if tag != "tag:yaml.org,2002:float"]
    for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text; executes nothing."""
    return yaml.load(text, Loader=_Loader)


def find(config: str | Path) -> Path:
    """The file that a configuration argument means: a path, or the name of a shipped study."""
    path = Path(config)
    if path.is_file():
        return path
    shipped = shipped_folder()
    named = shipped / f"{config}.yaml"
    if named.is_file():
        return named
    names = [str(file.relative_to(shipped).with_suffix("")) for file in shipped.rglob("*.yaml")]
    raise ConfigError(f"configuration {str(config)!r}: no such file, and no shipped study has this name{nearest(str(config), names)}")


def shipped_folder() -> Path:
    """Where the studies that come with clplat lie."""
    from clplat import configs

    return Path(configs.__path__[0])


def load_study(config: str | Path | Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> StudyConfig:
    """The study that a file, a shipped name or plain data describes, with dotted overrides applied."""
    if isinstance(config, Mapping):
        data = json.loads(json.dumps(config))
    else:
        try:
            data = parse_yaml(find(config).read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{config}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{config}: a study is a mapping with the keys name, stream, architecture, …")
    for key, text in overrides:
        try:
            set_key(data, key, parse_yaml(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: {text!r} is not valid YAML") from error
    study = parse(StudyConfig, data)
    for number in ("batch_size", "accumulate", "threads", "devices"):
        if getattr(study.training, number) < 1:
            raise ConfigError(f"training.{number}: must be at least 1, got {getattr(study.training, number)}")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(f"seeds: give at least one, each once; got {study.seeds}")
    if study.baseline is not None and study.baseline not in study.variants:
        raise ConfigError(f"baseline: no variant is called {study.baseline!r}{nearest(study.baseline, study.variants)}")
    return study


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` (numbers index lists) in nested plain data, making mappings on the way."""
    *path, last = key.split(".")
    place: Any = data
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--{key}: there is no such place in the configuration ({error})") from error


def parse(cls: type, data: Mapping[str, Any]) -> Any:
    """An instance of a configuration class from plain data; errors name the key, and what was expected."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(cls, data, "")
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{place}: {first['msg']}, got {first['input']!r}") from error


def _check_keys(cls: type, data: Any, path: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path.rstrip('.') or 'configuration'}: expected a mapping, got {data!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{path}{key}: there is no such key{nearest(str(key), known)}")
        nested = _NESTED.get(str(known[key].type))
        if nested is not None and value is not None:
            _check_keys(nested, value, f"{path}{key}.")
        elif key == "strategies" and isinstance(value, Mapping):
            for name, component in value.items():
                _check_keys(Component, component, f"{path}strategies.{name}.")
    for name, item in known.items():
        missing = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if missing and name not in data:
            raise ConfigError(f"{path}{name}: this key is required")


_NESTED = {
    cls.__name__: cls
    for cls in (
        Component, Budget, TrainingConfig, EvaluationConfig, CheckpointConfig, TrackingConfig, LauncherConfig
    )
}  # fmt: skip


def expand(study: StudyConfig) -> list[RunConfig]:
    """The runs of a study in the order variant, seed; every component checked."""
    shared = {f.name: plain(getattr(study, f.name)) for f in dataclasses.fields(RunConfig) if hasattr(study, f.name)}
    runs = []
    for variant, changes in (study.variants or {study.name: {}}).items():
        if not re.fullmatch(r"[\w.+-]+", variant):
            raise ConfigError(f"variants.{variant}: use letters, digits, '_', '-', '+' and '.' in a variant's name")
        key = f"variants.{variant}." if study.variants else ""
        try:
            merged = merge(shared, changes or {})
            run = parse(RunConfig, merged | {"study": study.name, "variant": variant, "seed": study.seeds[0]})
            run = _with_checked_components(run)
        except ConfigError as error:
            raise ConfigError(f"{key}{error}") from error
        runs += [dataclasses.replace(run, seed=seed) for seed in study.seeds]
    return runs


def _with_checked_components(run: RunConfig) -> RunConfig:
    return dataclasses.replace(
        run,
        stream=checked(run.stream, "stream", "stream"),
        architecture=checked(run.architecture, "architecture", "architecture"),
        strategies={n: checked(c, "strategy", f"strategies.{n}") for n, c in run.strategies.items()},
        training=dataclasses.replace(
            run.training, optimizer=checked(run.training.optimizer, "optimizer", "training.optimizer")
        ),
    )


def merge(base: Any, changes: Any) -> Any:
    """`base` with `changes` laid over it; another class_path drops the old init_args, null removes a key."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    other_class = "class_path" in changes and changes["class_path"] != base.get("class_path")
    result = {} if other_class or (changes.keys() & {"steps", "epochs", "tokens"} and "until" in base) else dict(base)
    for key, value in changes.items():
        if value is None and isinstance(base.get(key), dict):
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


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
    "training.accelerator",
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
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def load_run(path: Path) -> RunConfig:
    """A run's resolved configuration."""
    return parse(RunConfig, parse_yaml(path.read_text()))
