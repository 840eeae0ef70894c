"""The `launcher:` block of a configuration: where runs are carried out, how many at once, and with what each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from clplat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Which Ray cluster."""

    address: str = "local"
    """`local` starts a cluster on this machine and stops it afterwards; `auto` joins the one of RAY_ADDRESS or of this
    machine; else its address, host:port."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What is asked of Slurm for each run."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Limit of a run, as Slurm writes it (04:00:00, 1-12); the partition's if not given."""
    memory: str | None = None
    """Memory of a run, as Slurm writes it (8G); the partition's if not given."""
    requeue: bool = True
    """Whether a run that has saved itself before its time is over is put back into the queue, as one is whose node was
    lost."""
    signal_seconds: int = 120
    """So long before its time is over a run is sent SIGUSR1, to save itself."""
    poll_seconds: float = 5.0
    """How often the queue is looked at."""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, each a line: --constraint=a100."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before each run: module load cuda."""


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """Where the runs of a study are carried out, and how many side by side."""

    kind: Literal["local", "ray", "slurm"] = "local"
    workers: int | Literal["auto"] = "auto"
    """Runs side by side. auto: one per GPU, or as many as cores allow; with slurm, all of a study."""
    retries: int = 1
    """How often a run whose process was lost is begun again from its last checkpoint."""
    cpus: int | None = None
    """CPU cores that ray and slurm reserve for a run; its threads times its devices if not given."""
    gpus: int | None = None
    """GPUs that ray and slurm reserve for a run; its devices where it trains on GPUs if not given."""
    ray: RayConfig = field(default_factory=RayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def check_launcher(config: LauncherConfig) -> None:
    """Refuse what cannot work on any machine."""
    slurm = config.slurm
    for name, number, least in (
        ("workers", None if config.workers == "auto" else config.workers, 1), ("retries", config.retries, 0),
        ("cpus", config.cpus, 1), ("gpus", config.gpus, 0), ("slurm.signal_seconds", slurm.signal_seconds, 1),
    ):  # fmt: skip
        if number is not None and int(number) < least:
            raise ConfigError(f"launcher.{name}: must be at least {least}, got {number}")
    for line in slurm.extra:
        if not re.fullmatch(r"--?[a-zA-Z][^\n]*", line):
            raise ConfigError(f"launcher.slurm.extra: expected options of sbatch, such as --qos=long; got {line!r}")
    for key in ("partition", "account", "memory"):
        value = getattr(slurm, key)
        if value is not None and not re.fullmatch(r"[\w.,:+-]+", value):
            raise ConfigError(f"launcher.slurm.{key}: expected one word, got {value!r}")
    if slurm.poll_seconds <= 0:
        raise ConfigError(f"launcher.slurm.poll_seconds: must be positive, got {slurm.poll_seconds}")
    if slurm.time is not None and seconds(slurm.time) < slurm.signal_seconds + 120:
        raise ConfigError(
            f"launcher.slurm.time: {slurm.time} leaves a run no two minutes before it is told to save itself "
            f"(launcher.slurm.signal_seconds: {slurm.signal_seconds}); give it more time"
        )


def seconds(time: str) -> int:
    """A time limit as Slurm writes it: m, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        raise ConfigError(f"launcher.slurm.time: expected a time as Slurm writes it, 04:00:00 or 1-12; got {time!r}")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, rest = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + rest
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
