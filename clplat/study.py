"""A study from start to finish: check everything, lay out its folders, launch the runs, compare them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from clplat.config import RunConfig, StudyConfig, load_run, plain, save
from clplat.errors import ClplatError, ConfigError, Interrupted
from clplat.execution import Outcome
from clplat.journal import ENDED, last_status
from clplat.launch import Launcher, launch, launcher_of, most_devices
from clplat.machine import check_room
from clplat.plan import first_seed, read_tasks, write_plan
from clplat.storage import FULL
from clplat.study_file import check_unchanged, expand, load_study, run_folders

if TYPE_CHECKING:
    from clplat.assembly import Parts
    from clplat.streams.base import Stream

AnyConfig = TypeVar("AnyConfig", RunConfig, StudyConfig)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study that has been started: its folder, and how each run ended."""

    name: str
    folder: Path
    outcomes: list[Outcome]
    unsent: str = ""
    """What MLflow has not got, in a sentence; empty when it has all."""

    @property
    def status(self) -> str:
        """FINISHED when every run did or was pruned, else how the first other one ended: FAILED, KILLED or BUSY."""
        return next((outcome.status for outcome in self.outcomes if outcome.status not in ENDED), "FINISHED")

    @property
    def code(self) -> int:
        """Exit code: 0 when every run finished, else the first other one."""
        return next((outcome.code for outcome in self.outcomes if outcome.code), 0)


def run_study(study: StudyConfig, console: Console) -> Study:
    """Check, lay out and carry out a study. Nothing is written before everything has been checked."""
    runs = expand(study)
    launcher = launcher_of(study, len(runs), max(run.training.devices for run in runs))
    with launcher.ready():
        streams = preflight(runs, here=study.launcher.kind == "local")
        folder = lay_out(study, runs, streams)
        return carry_out(folder, study, console, launcher)


def preflight(runs: Sequence[RunConfig], *, here: bool = True) -> list[dict[str, Any]]:
    """Build every variant once, so that whatever is wrong with one is said before any is trained.

    `here`: they will run on this machine, which must have the cores and GPUs that they want.

    Returns what each of the study's streams holds, as the first seed has it.
    """
    from clplat.assembly import assemble, prepared_stream
    from clplat.early_end import check_early_ends
    from clplat.strategies.world import World

    streams: dict[str, Stream] = {}
    held: dict[str, dict[str, Any]] = {}
    for run in first_seed(runs):
        if here:
            check_room(run.training)
        else:
            run = dataclasses.replace(run, training=dataclasses.replace(run.training, accelerator="cpu"))
        key = json.dumps(plain(run.stream), sort_keys=True)
        streams[key] = streams.get(key) or prepared_stream(run)
        held[key] = held.get(key) or read_tasks(run, streams[key])
        try:
            # As the first of all its processes: what several cannot do is said here too.
            parts = assemble(run, World(size=run.training.devices), streams[key])
            check_early_ends(run, parts.hooks.select_tasks(parts.stream.tasks))
            try_out(parts)
        except ConfigError as error:
            raise ConfigError(f"{of_variant(run)}{error}") from error
    return list(held.values())


def of_variant(run: RunConfig) -> str:
    """Which of the study's variants an error is about; nothing where it has none."""
    return "" if run.variant == run.study else f"variant {run.variant}: "


def try_out(parts: Parts) -> None:
    """Make the optimizer, and let the model answer two rows."""
    import torch

    if not trains(parts):
        # A strategy may bring what is trained when a task begins.
        parts.context.task = parts.hooks.select_tasks(parts.stream.tasks)[0]
        parts.hooks.task_start(parts.context.task)
        if not trains(parts):
            raise ConfigError(
                f"architecture: nothing of {type(parts.architecture).__name__} is trained; give it a strategy that "
                "brings what is (Prompted: ProgressivePrompts or PromptPool), or another architecture"
            )
    parts.learner.configure_optimizers()
    rows = parts.stream.tasks[0].train.batch(torch.arange(min(2, len(parts.stream.tasks[0].train))))
    try:
        with torch.no_grad():
            parts.architecture.eval()(rows.to(parts.device))
    except Exception as error:
        name, shape = type(parts.architecture).__name__, tuple(rows.inputs.shape)
        raise ConfigError(
            f"architecture: {name} cannot answer rows {shape} of this stream ({type(error).__name__}: {error})"
        ) from error


def trains(parts: Parts) -> bool:
    """Whether the model has a weight to train."""
    return any(weight.requires_grad for weight in parts.architecture.parameters())


def lay_out(study: StudyConfig, runs: Sequence[RunConfig], streams: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Make the study's folder with its plan, and one folder a run, each with its resolved configuration."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(study.folder) / f"{study.name}-{stamp}-{secrets.token_hex(2)}"
    try:
        folder.mkdir(parents=True)
        save(settled(study), folder / "study.yaml")
        write_plan(folder, runs, streams)
        lay_out_runs(folder, runs)
    except OSError as error:
        # Half a study would be found and could not be resumed.
        shutil.rmtree(folder, ignore_errors=True)
        fix = "free some space there, or name another folder" if error.errno in FULL else "name one that can be written"
        raise ConfigError(f"folder: {folder} cannot be made ({error.strerror}); {fix}") from error
    return folder


def lay_out_runs(folder: Path, runs: Sequence[RunConfig]) -> list[str]:
    """Make those run folders, or configurations in them, that are not there; a sentence about each."""
    made = []
    for run in runs:
        place = folder / f"{run.variant}-s{run.seed}"
        if not (place / "config.yaml").is_file():
            what = "config.yaml is gone; it is written again" if place.is_dir() else "folder is gone; it is run anew"
            made.append(f"{place.name}: its {what}")
            place.mkdir(exist_ok=True)
            save(settled(run), place / "config.yaml")
    return made


def settled(config: AnyConfig) -> AnyConfig:
    """The configuration with a tracking URI that means the same from any folder."""
    from clplat.mlflow_store import absolute

    tracking = dataclasses.replace(config.tracking, uri=absolute(config.tracking.uri))
    return dataclasses.replace(config, tracking=tracking)


def carry_out(folder: Path, study: StudyConfig, console: Console, launcher: Launcher | None = None) -> Study:
    """Run what has not finished yet among a study's runs, with the record of the whole study above them.

    `launcher`: one that has been made ready for it already.
    """
    from clplat.study_record import send_unsent, settle_study, start_study

    folders = run_folders(folder)
    open_runs = [run for run in folders if last_status(run) not in ENDED]
    for run in open_runs if study.launcher.kind == "local" else ():
        check_room(load_run(run / "config.yaml").training)
    check_unchanged(folder, open_runs)
    launcher, unsent = launcher or launcher_of(study, len(open_runs), most_devices(open_runs)), ""
    try:
        if study.tracking.enabled:
            start_study(folder)
        outcomes = launch(open_runs, launcher=launcher, console=console, retries=study.launcher.retries)
    except (Interrupted, ClplatError) as stop:
        # Between the checks and the first run, or by a scheduler that refuses: runs under way save themselves.
        if isinstance(stop, Interrupted):
            stop.remedy = f"; `clplat resume {folder}` starts the runs of this study"
        if study.tracking.enabled:
            settle_study(folder)
        raise
    if study.tracking.enabled:
        unsent = send_unsent(folders)
        settle_study(folder)
    return Study(name=folder.name, folder=folder, outcomes=outcomes, unsent=unsent)


def conclude(study: Study, console: Console) -> None:
    """The end of a study: the comparison in the terminal, the report, and how to open MLflow on it."""
    from clplat import report
    from clplat.page import write_report
    from clplat.study_results import journal_results, load_study_results

    config = load_study(study.folder / "study.yaml")
    results = None
    if config.tracking.enabled and not study.unsent:
        # Without a server, or with one that lacks a part, the runs are done and on disk all the same.
        with contextlib.suppress(ConfigError):
            results = load_study_results(str(study.folder))
    recorded, results = results is not None, results or journal_results(study.folder)
    console.print(report.compare_table(results, config.baseline))
    console.print(report.finding(results, config.baseline), soft_wrap=True)
    try:
        console.print(f"report: {write_report(results, str(study.folder), config.baseline)}", soft_wrap=True)
    except ClplatError as error:
        console.print(f"report: {error}", soft_wrap=True)
    if recorded:
        console.print(f"MLflow: clplat ui --uri {config.tracking.uri}", soft_wrap=True)
    if study.unsent or not recorded:
        why = study.unsent or "MLflow has not got this study"
        console.print(f"{why}; `clplat sync {study.folder}` sends it.", soft_wrap=True)
    busy = [outcome for outcome in study.outcomes if outcome.status == "BUSY"]
    if busy:
        console.print(f"{len(busy)} runs are in the hands of another process; nothing is wrong with them.")
    failed = [outcome for outcome in study.outcomes if outcome.status == "FAILED"]
    if any(outcome.cause == "memory" for outcome in failed):
        console.print(
            f"A run found too little memory on its device. Where others had it, `clplat resume {study.folder}` goes on "
            "once they have ended; where it had the device alone, it needs a new study with smaller batches.",
            soft_wrap=True,
        )
    if any(outcome.cause in ("process", "storage") for outcome in failed):
        when = "When the disk has room, " if any(outcome.cause == "storage" for outcome in failed) else ""
        console.print(f"{when}`clplat resume {study.folder}` goes on with them from what was saved.", soft_wrap=True)
    if any(outcome.status == "KILLED" for outcome in study.outcomes):
        console.print(f"`clplat resume {study.folder}` goes on with the runs that were stopped.", soft_wrap=True)
    if any(not outcome.cause for outcome in failed):
        console.print(
            "A run that failed of itself will fail again: it needs a new study with the change that its message names.",
            soft_wrap=True,
        )
