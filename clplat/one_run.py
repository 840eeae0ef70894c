"""One run of a study, alone: started by a person, or by a batch job that a launcher counts on."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clplat.config import load_run
from clplat.errors import ConfigError
from clplat.execution import Outcome
from clplat.journal import last_status
from clplat.launch import launch
from clplat.launchers import post
from clplat.launchers.local import Local
from clplat.machine import check_room
from clplat.plan import check_data, check_plan
from clplat.study import Study
from clplat.study_file import check_unchanged, load_study, run_folders


def run_one(study: str | Path, variant: str | None, seed: int | None, console: Console) -> Outcome:
    """Carry out one run of a study that has been laid out, from its last checkpoint if it has one: `clplat run FOLDER
    --variant V --seed S`, which is what a batch job does."""
    folder = Path(study)
    if not (folder / "study.yaml").is_file():
        raise ConfigError(f"{study}: is a folder without a study.yaml; name a study's folder, or a YAML file")
    if variant is None or seed is None:
        raise ConfigError(
            f"{study}: is a study's folder; name one of its runs with --variant and --seed, or `clplat resume {study}` "
            "goes on with all"
        )
    run = folder / f"{variant}-s{seed}"
    if not (run / "config.yaml").is_file():
        names = ", ".join(one.name for one in run_folders(folder))
        raise ConfigError(f"{study}: there is no {run.name} among its runs: {names}")
    if post.in_job() and post.expected(run) is not None:
        return post.work(run)
    outcomes = resume_one(run, console).outcomes
    return outcomes[0] if outcomes else Outcome(folder=run, status="FINISHED")


def resume_one(folder: Path, console: Console) -> Study:
    """Go on with one run on this machine, and settle the status of the study that it belongs to."""
    from clplat.study_record import settle_study

    if last_status(folder) == "FINISHED":
        console.print(f"{folder}: finished already; nothing to do")
        return Study(name=folder.parent.name, folder=folder.parent, outcomes=[])
    of_study = (folder.parent / "study.yaml").is_file()
    if of_study:
        check_plan(folder.parent, load_study(folder.parent / "study.yaml"))
        check_unchanged(folder.parent, [folder])
        check_data(folder.parent)
    config = load_run(folder / "config.yaml")
    check_room(config.training)
    outcomes = launch([folder], launcher=Local(workers=1, threads=config.training.threads), console=console)
    if of_study and config.tracking.enabled:
        settle_study(folder.parent)
    return Study(name=folder.parent.name, folder=folder.parent, outcomes=outcomes)
