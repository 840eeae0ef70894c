"""Carry out runs with the launcher that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from rich.console import Console

from clplat.config import StudyConfig, load_run
from clplat.errors import ConfigError
from clplat.execution import Outcome
from clplat.launchers.desk import Desk
from clplat.launchers.local import Local
from clplat.launchers.network_disks import check_disk
from clplat.machine import cores
from clplat.mlflow_store import absolute, check_uri
from clplat.progress import Board
from clplat.supply import Listed, Supply


class Launcher(Protocol):
    """Carries out what a desk gives, until it gives nothing more or somebody asks to stop."""

    def ready(self) -> AbstractContextManager[None]:
        """Inside, what takes a while to begin has begun: a study is checked and laid out meanwhile."""
        ...

    def serve(self, desk: Desk) -> int:
        """The exit code of the stop that was asked for, 0 when nobody did."""
        ...


def launch(folders: Sequence[Path], *, launcher: Launcher, console: Console, retries: int = 1) -> list[Outcome]:
    """Carry out run folders; outcomes in the order of the folders."""
    listed = Listed(folders)
    code = serve(listed, runs=len(folders), launcher=launcher, console=console, retries=retries)
    return listed.outcomes(code)


def serve(supply: Supply, *, runs: int | None, launcher: Launcher, console: Console, retries: int = 1) -> int:
    """Carry out what a supply gives; `runs` is how many a person is told to expect, None where the supply tells itself.

    A run whose process is lost is begun again `retries` times. Returns the exit code of the stop that was asked for, 0
    when nobody did.
    """
    with Board(console, runs) as board:
        return launcher.serve(Desk(supply, board, retries=retries))


def launcher_of(study: StudyConfig, runs: int, devices: int) -> Launcher:
    """The launcher of a study or tune with so many runs, of which the largest takes so many devices.

    Raises `ConfigError` where it cannot work here.
    """
    config = study.launcher
    if study.tracking.enabled:
        check_uri(study.tracking.uri)
    if config.kind == "local":
        workers, threads = worker_count(study, runs, devices), study.training.threads
        return Local(workers=workers, threads=threads, devices=devices, record=study.tracking.enabled)
    if study.tracking.enabled:
        check_disk("tracking.uri", absolute(study.tracking.uri))
    if config.kind == "slurm":
        from clplat.launchers.slurm import SlurmArrays, check_slurm

        check_slurm()
        return SlurmArrays(config)
    from clplat.launchers.ray_cluster import RayCluster, check_ray

    check_ray()
    if devices > 1:
        raise ConfigError("launcher.kind: ray carries out runs of one process; set training.devices to 1, or use slurm")
    return RayCluster(config, study.training)


def most_devices(folders: Sequence[Path]) -> int:
    """The devices of the run that takes most of them; variants may differ in it."""
    return max((load_run(folder / "config.yaml").training.devices for folder in folders), default=1)


def worker_count(study: StudyConfig, runs: int, devices: int) -> int:
    """Runs side by side on this machine: as configured, or as many as have `devices` GPUs each, or as cores allow."""
    if study.launcher.workers != "auto":
        return max(1, min(int(study.launcher.workers), runs))
    import torch

    on_gpu = study.training.accelerator != "cpu" and torch.cuda.is_available()
    room = torch.cuda.device_count() if on_gpu else cores() // study.training.threads
    return max(1, min(room // devices, runs))
