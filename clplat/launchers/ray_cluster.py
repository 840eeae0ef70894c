"""The `ray` launcher: each run a task of a Ray cluster, one that is there or one started on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clplat.config import TrainingConfig, load_run
from clplat.errors import ClplatError, ConfigError
from clplat.interruption import SIGNALS
from clplat.launchers import post
from clplat.launchers.desk import Desk
from clplat.launchers.options import LauncherConfig
from clplat.launchers.remote import End, Remote
from clplat.machine import cores
from clplat.mlflow_store import short

POLL_SECONDS = 0.2


def check_ray() -> None:
    """Refuse where Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise ConfigError("launcher.kind: ray is not installed here; `pip install 'clplat[ray]'`, or use kind: local")


class RayCluster:
    """Connects to a cluster while runs go on."""

    def __init__(self, config: LauncherConfig, training: TrainingConfig) -> None:
        """`training` is the study's, from which it follows how many runs fit side by side."""
        self.config, self.training = config, training

    def ready(self) -> AbstractContextManager[None]:
        """Nothing is begun beforehand."""
        return nullcontext()

    def serve(self, desk: Desk) -> int:
        """Carry out what there is; the exit code of the stop that was asked for, 0 when nobody did."""
        with _connected(self.config, self.training) as ray:
            room = self.config.workers
            if room == "auto":
                there, (cpus, gpus) = ray.cluster_resources(), reserved(self.training, self.config, ray)
                room = int(there.get("GPU", 0) // gpus if gpus else there.get("CPU", 1) // cpus)
            return Remote(_Tasks(ray, self.config), room=max(1, room), seconds=POLL_SECONDS).serve(desk)


def reserved(training: TrainingConfig, config: LauncherConfig, ray: Any) -> tuple[int, int]:
    """CPU cores and GPUs that a run is given: Ray hides every GPU from a task that asks for none."""
    cpus = config.cpus or training.threads * training.devices + training.workers
    on_gpu = training.accelerator != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    return cpus, config.gpus if config.gpus is not None else training.devices if on_gpu else 0


@contextmanager
def _connected(config: LauncherConfig, training: TrainingConfig) -> Iterator[Any]:
    """Ray, connected; a cluster that was started here is stopped at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    address = config.ray.address
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        each = config.cpus or training.threads * training.devices + training.workers
        workers = 1 if config.workers == "auto" else config.workers
        # On localhost alone, and with as many cores as were asked for, as with kind: local.
        options |= {"num_cpus": max(cores(), workers * each), "include_dashboard": False}
        options |= {"_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"launcher.ray.address: {address!r} gives no cluster ({short(error)}); start one with `ray start --head`, "
            "or use address: local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
        # It takes SIGTERM over, and does not give it back.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_fits(ray: Any, run: Path, cpus: int, gpus: int) -> None:
    """Refuse a run that no machine of the cluster could ever take: it would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in machines):
        raise ConfigError(
            f"launcher: {run.name} wants {cpus} CPU cores and {gpus} GPUs, and no machine of the Ray cluster has as "
            "many; set launcher.cpus and launcher.gpus, or training.threads, to less"
        )


def carry_out(run: str, here: str) -> None:
    """A task: one run, in the folder in which the study was started, where it is there."""
    if Path(here).is_dir():
        os.chdir(here)
    post.work(Path(run))


class _Tasks:
    """A scheduler that is a Ray cluster."""

    def __init__(self, ray: Any, config: LauncherConfig) -> None:
        self._ray, self._config = ray, config
        self._tasks: dict[Path, Any] = {}
        self._remote = ray.remote(carry_out)

    def submit(self, runs: Sequence[Path], *, asks: bool) -> None:
        trainings = {run: load_run(run / "config.yaml").training for run in runs}
        wanted = {run: reserved(training, self._config, self._ray) for run, training in trainings.items()}
        for run, (cpus, gpus) in wanted.items():
            _check_fits(self._ray, run, cpus, gpus)
        for run, (cpus, gpus) in wanted.items():
            post.expect(run, asks=asks)
            environment = {"OMP_NUM_THREADS": str(trainings[run].threads)}
            task = self._remote.options(
                num_cpus=cpus, num_gpus=gpus, max_retries=0, name=run.name, runtime_env={"env_vars": environment}
            )
            self._tasks[run] = task.remote(str(run.resolve()), os.getcwd())

    def ended(self) -> Mapping[Path, End]:
        if not self._tasks:
            return {}
        done, _ = self._ray.wait(list(self._tasks.values()), num_returns=len(self._tasks), timeout=0)
        return {run: self._end(task) for run, task in self._tasks.items() if task in done}

    def _end(self, task: Any) -> End:
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        try:
            self._ray.get(task)
        except TaskCancelledError:
            return End(why="its Ray task was cancelled", kind="cancelled")
        except RayTaskError as error:
            if isinstance(error.cause, ClplatError):
                return End(why=str(error.cause), kind="refused")
            return End(why=f"its Ray task failed ({short(error)})")
        except RayError as error:
            return End(why=f"its Ray worker died ({short(error)})")
        return End(why="its Ray task left no outcome")

    def forget(self, run: Path) -> None:
        del self._tasks[run]

    def cancel(self, runs: Sequence[Path], *, at_once: bool) -> None:
        for run in runs:
            self._ray.cancel(self._tasks[run], force=at_once)
