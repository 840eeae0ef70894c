"""The `slurm` launcher: runs as arrays of batch jobs, each task of which is `clplat run FOLDER --variant V --seed S`.

Jobs outlive the process that submitted them: `clplat resume` finds those that are still in the queue and goes on
looking after them, rather than submitting their runs again.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from clplat.config import load_run
from clplat.errors import ClplatError, ConfigError
from clplat.launchers import post
from clplat.launchers.desk import Desk
from clplat.launchers.options import LauncherConfig
from clplat.launchers.remote import MANY, End, Remote
from clplat.launchers.slurm_script import script

COMMANDS = ("sbatch", "squeue", "scancel")
FOLDER = "slurm"
"""In a study's folder: what was submitted, and what the jobs printed."""
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
"""States in which a job ends; in all others it runs, will run, or is being cleaned up."""
REMEDIES = {
    "OUT_OF_MEMORY": "; give it more: launcher.slurm.memory",
    "TIMEOUT": "; give it more: launcher.slurm.time",
    "DEADLINE": "; give it more: launcher.slurm.time",
}
TRIES, PAUSE_SECONDS = 5, 3.0
"""How often a command of Slurm is tried while its controller does not answer."""


def check_slurm() -> None:
    """Refuse where Slurm's commands are not there, or no cluster answers them."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"launcher.kind: slurm needs {', '.join(COMMANDS)}, and there is no {', '.join(missing)} on the PATH here; "
            "start it on a login node of the cluster (Debian: apt-get install slurm-wlm), or use kind: local"
        )
    try:
        _queue()
    except ClplatError as error:
        raise ConfigError(
            f"launcher.kind: no Slurm answers here ({error}); use --launcher.kind local, or start it on a login node "
            "of the cluster"
        ) from error


class SlurmArrays:
    """Submits runs and looks after them; `workers` of them are let run at once, all of a study if that is not said."""

    def __init__(self, config: LauncherConfig) -> None:
        self.config = config

    def ready(self) -> AbstractContextManager[None]:
        """Nothing is begun beforehand."""
        return nullcontext()

    def serve(self, desk: Desk) -> int:
        """Carry out what there is; the exit code of the stop that was asked for, 0 when nobody did."""
        workers = self.config.workers
        # A study's runs are all submitted now, so that they go on whatever becomes of this process; a tune, which says
        # how many, chooses its next trial when one has ended.
        room = int(workers) if desk.asks and workers != "auto" else MANY
        scheduler = _Jobs(self.config, at_once=None if workers == "auto" else int(workers))
        return Remote(scheduler, room=room, seconds=self.config.slurm.poll_seconds).serve(desk)


class _Jobs:
    """A scheduler that is Slurm."""

    def __init__(self, config: LauncherConfig, *, at_once: int | None) -> None:
        self._config, self._at_once = config, at_once
        self._jobs: dict[Path, str] = {}
        self._unseen: dict[Path, int] = {}

    def submit(self, runs: Sequence[Path], *, asks: bool) -> None:
        states = _queue()
        for run in runs:
            job = (post.expected(run) or {}).get("job", "")
            if states.get(job, "COMPLETED") not in OVER:
                self._jobs[run] = job
        fresh = [run for run in runs if run not in self._jobs]
        if not fresh:
            return
        for run in fresh:
            post.expect(run, asks=asks)
        study = fresh[0].parent.resolve()
        (study / FOLDER).mkdir(exist_ok=True)
        path = study / FOLDER / f"array-{len(list((study / FOLDER).glob('*.sh'))) + 1:03d}.sh"
        configs = [load_run(run / "config.yaml") for run in fresh]
        path.write_text(script(study, configs, self._config, at_once=self._at_once))
        array = _command("sbatch", "--parsable", str(path)).split(";")[0].strip()
        for number, run in enumerate(fresh):
            self._jobs[run] = f"{array}_{number}"
            post.expect_job(run, self._jobs[run])

    def ended(self) -> Mapping[Path, End]:
        try:
            states = _queue()
        except ClplatError:
            # The controller is away for a while: what runs, runs.
            return {}
        found = {}
        for run, job in self._jobs.items():
            # Slurm forgets jobs some minutes after their end; one look that lacks it may be one that came too early.
            self._unseen[run] = 0 if job in states else self._unseen.get(run, 0) + 1
            state = states.get(job, "COMPLETED" if self._unseen[run] > 1 else "PENDING")
            if state in OVER:
                log = run.parent / FOLDER / f"{job}.txt"
                why = f"its job {job} ended ({state}) without a word{REMEDIES.get(state, '')}; it printed {log}"
                found[run] = End(why=why, kind="cancelled" if state == "CANCELLED" else "lost")
        return found

    def forget(self, run: Path) -> None:
        del self._jobs[run]
        self._unseen.pop(run, None)

    def cancel(self, runs: Sequence[Path], *, at_once: bool) -> None:
        jobs = [self._jobs[run] for run in runs]
        if jobs:
            _command("scancel", *(["--signal=KILL", "--full"] if at_once else []), *jobs)


def _queue() -> dict[str, str]:
    """The state of each of this user's jobs, tasks of arrays by `array_task`; those that ended lately too."""
    said = _command("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T")
    lines = [line.strip().partition("|") for line in said.splitlines() if "|" in line]
    return {job: state for job, _, state in lines}


def _command(*words: str) -> str:
    """What a command of Slurm prints; raises `ClplatError` with what it complains of."""
    for attempt in range(TRIES):
        done = subprocess.run(words, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode == 0:
            return done.stdout
        away = "Unable to contact" in done.stderr or "Socket timed out" in done.stderr
        if not away or attempt == TRIES - 1:
            break
        time.sleep(PAUSE_SECONDS)
    # Each line begins with who says it; what stopped the command comes last.
    said = [line.removeprefix(f"{words[0]}: ").strip() for line in done.stderr.splitlines() if line.strip()]
    raise ClplatError(f"launcher.slurm: {words[0]} refused ({'; '.join(said[-2:]) or done.returncode})")
