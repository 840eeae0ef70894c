"""A tune from its configuration to its gain: everything checked, the search, the report; and taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clplat.config import StudyConfig, flat, plain, save, scientific
from clplat.errors import ConfigError, StorageError, StudyFailedError
from clplat.launch import launcher_of, serve
from clplat.launchers.network_disks import check_disk
from clplat.lease import held
from clplat.storage import writing
from clplat.study import conclude, settled
from clplat.study_file import run_folders
from clplat.study_record import send_unsent, settle_study
from clplat.tuning import front, gain, outcome
from clplat.tuning.checks import OBJECTIVES, TRIALS, load_tune
from clplat.tuning.front import Row
from clplat.tuning.options import TUNE_FILE
from clplat.tuning.outcome import Tuned
from clplat.tuning.page import write_page
from clplat.tuning.protocol import Protocol, prepare
from clplat.tuning.search import Search, enter_trials
from clplat.tuning.trials import GRACE_SECONDS, Trials, check_storage, storage_errors

FRONT, SETTINGS, PAGE = "front.csv", "best.yaml", "tuning.html"
"""What a tune leaves beside it."""
CHANGEABLE = ("tune.trials", "tune.timeout", "launcher")
"""What a resumed tune may change, with the keys below them."""


def run_tune(study: StudyConfig, console: Console) -> Tuned:
    """Check, lay out and carry out a tune. Nothing is written before everything has been checked."""
    study = settled(study)
    _check_launcher(study)
    protocol = prepare(study)
    if study.tune.storage:
        check_storage(study.tune.storage)
    folder = Path(study.folder) / f"{study.name}-tune-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"folder: {folder} cannot be made ({error.strerror}); name one that can be written"
        ) from error
    with writing(folder):
        save(study, folder / TUNE_FILE)
    return _carry_on(folder, study, protocol, console)


def resume_tune(folder: Path, overrides: Sequence[tuple[str, str]], console: Console) -> Tuned:
    """Go on with a tune: unfinished runs from their checkpoints, finished trials never again."""
    for key, _ in overrides:
        if not any(f"{key}.".startswith(f"{free}.") for free in CHANGEABLE):
            raise ConfigError(f"--{key}: a resumed tune stays the same search; {', '.join(CHANGEABLE)} may change")
    study = settled(load_tune(folder / TUNE_FILE, overrides))
    if study.tune.sampler == "grid" and any(key == "tune.trials" for key, _ in overrides):
        raise ConfigError("--tune.trials: the points of a grid were chosen when it was begun; start a new tune")
    _check_launcher(study)
    protocol = prepare(study)
    with writing(folder):
        save(study, folder / TUNE_FILE)
    return _carry_on(folder, study, protocol, console)


def _check_launcher(study: StudyConfig) -> None:
    """Refuse a launcher that cannot work here, or not for a search."""
    launcher_of(study, study.tune.trials or TRIALS, study.training.devices)
    if study.launcher.kind == "slurm" and study.launcher.workers == "auto":
        raise ConfigError("launcher.workers: a tune begins as many trials at once; with slurm, say how many")
    if study.launcher.kind != "local":
        # The search's own database; in the folder of the tune where none is named.
        default = f"sqlite:///{(Path(study.folder) / 'optuna.db').resolve()}"
        check_disk("tune.storage", study.tune.storage or default)


def _carry_on(folder: Path, study: StudyConfig, protocol: Protocol, console: Console) -> Tuned:
    objectives = {name: OBJECTIVES[name] for name in study.tune.objectives}
    with held(folder):
        if not (folder / "study.yaml").is_file():
            with writing(folder):
                enter_trials(folder, protocol, {})
        url = study.tune.storage or f"sqlite:///{(folder / 'optuna.db').resolve()}"
        points = _first_points(study, protocol)
        limit = len(points) if study.tune.sampler == "grid" else study.tune.trials or TRIALS
        trials = Trials(
            url, study.name, str(folder.resolve()), directions=list(objectives.values()),
            distributions=protocol.space.distributions(), sampler=study.tune.sampler, seed=study.tune.sampler_seed,
            limit=limit,
        )  # fmt: skip
        with storage_errors(url), trials.beating():
            trials.begin(_facts(study, protocol), points)
            console.print(f"{folder}: tuning on {protocol.tuned_on} ({trials.progress()})", soft_wrap=True)
            if study.tracking.enabled:
                outcome.start_record(folder, study, protocol, trials)
            search = Search(folder, study, protocol, trials, lambda text: console.print(text, soft_wrap=True))
            code, unsent = _search(search, study, limit, console)
            rows = front.table(trials.all(), protocol.space, objectives)
            reporter = _reporter(trials, rows, code)
        return _conclude_search(folder, study, protocol, rows, code, unsent, reporter, console)


def _search(search: Search, study: StudyConfig, limit: int, console: Console) -> tuple[int, str]:
    """The search itself: the code of the stop that was asked for, and what MLflow has not got. However it ends,
    statuses are true."""
    runs, unsent = limit * len(study.tune.seeds), ""
    try:
        search.resume()
        launcher = launcher_of(study, runs, study.training.devices)
        code = serve(search, runs=None, launcher=launcher, console=console, retries=study.launcher.retries)
    finally:
        if study.tracking.enabled:
            unsent = send_unsent(run_folders(search.folder))
            settle_study(search.folder)
    if search.trouble:
        raise StorageError(f"{search.trouble} `clplat resume {search.folder}` goes on from there.")
    return code, unsent


def _reporter(trials: Trials, rows: Sequence[Row], code: int) -> str:
    """The folder of the tune that makes the report: of several on one storage the first that finds no trial open."""
    if not code and not any(row.state == "RUNNING" for row in rows) and "reporter" not in trials.study.user_attrs:
        trials.study.set_user_attr("reporter", trials.folder)
    return trials.study.user_attrs.get("reporter", "")


def _conclude_search(
    folder: Path,
    study: StudyConfig,
    protocol: Protocol,
    rows: list[Row],
    code: int,
    unsent: str,
    reporter: str,
    console: Console,
) -> Tuned:
    """After the search: its files, then the report's runs, then the gain; or what is missing."""
    objectives = {name: OBJECTIVES[name] for name in study.tune.objectives}
    outcome.write_front(folder, protocol, rows, objectives)
    best = front.best(rows, objectives)
    known = Tuned(folder=folder, status="KILLED", code=code, rows=rows, best=best, unsent=unsent)
    if code or any(row.state == "RUNNING" for row in rows):
        text = (
            f"The search has not ended ({front.counts(rows).rstrip('.')}); `clplat resume {folder}` goes on with it, "
            "and reports when all trials have ended."
        )
        if not code:
            minutes = GRACE_SECONDS // 60
            text += f" What is under way is another tune's; after {minutes} minutes of silence it is begun anew."
        return _told(dataclasses.replace(known, text=text), study, protocol)
    if reporter != str(folder.resolve()):
        return dataclasses.replace(known, status="FINISHED", text=f"The report is made by the tune in {reporter}.")
    if best is None:
        said = next((row.reason for row in rows if row.reason), "nothing")
        text = f"No trial has finished; the first said: {said}"
        _told(dataclasses.replace(known, text=text), study, protocol)
        raise StudyFailedError(f"{folder}: {text[0].lower()}{text[1:]}")
    return _report(known, best, study, protocol, console)


def _report(known: Tuned, best: Row, study: StudyConfig, protocol: Protocol, console: Console) -> Tuned:
    """The runs of the report, the gain that they show, and the page."""
    console.print(f"{best.name} is best on {protocol.tuned_on}; default and best run on the full stream now")
    report = gain.carry_out_report(known.folder, protocol, best, console)
    known = dataclasses.replace(
        known, report=report, status=report.status, code=report.code, unsent=known.unsent or report.unsent
    )
    if report.status in ("KILLED", "BUSY"):
        text = f"The report's runs have not ended; `clplat resume {known.folder}` goes on."
        return _told(dataclasses.replace(known, text=text), study, protocol)
    conclude(report, console)
    found = gain.gains(report.folder, study.tune.objectives, protocol.seen)
    text = "The report's runs of default or best failed, so that no gain is known; their messages stand above."
    if found or best.is_default:
        text = gain.sentence(found, best, protocol)
    return _told(dataclasses.replace(known, gains=found, text=text), study, protocol)


def _told(known: Tuned, study: StudyConfig, protocol: Protocol) -> Tuned:
    """The page of a tune as it stands, and the same in MLflow: what an earlier end left there would be out of date."""
    folder, report = known.folder, known.report.folder if known.report else None
    objectives = {name: OBJECTIVES[name] for name in study.tune.objectives}
    page = report.name if report and (report / "report.html").is_file() else ""
    with writing(folder):
        write_page(folder, protocol, known.rows, objectives, known.gains, known.text, page)
    if not study.tracking.enabled:
        return known
    ended = report is not None and known.status not in ("KILLED", "BUSY")
    unsent = outcome.send_record(known, protocol, ended=ended)
    return dataclasses.replace(known, unsent=unsent or known.unsent)


def show(tuned: Tuned, console: Console) -> None:
    """The end of a tune: the front, the gain whichever its sign, and where everything lies."""
    if tuned.best is not None:
        console.print(front.front_table(tuned.rows))
    console.print(tuned.text, soft_wrap=True)
    for name, what in ((FRONT, "all trials"), (SETTINGS, "best settings: clplat run"), (PAGE, "page")):
        if (tuned.folder / name).is_file():
            console.print(f"{what} {tuned.folder / name}" if what[-3:] == "run" else f"{what}: {tuned.folder / name}",
                          soft_wrap=True)  # fmt: skip
    if tuned.unsent:
        console.print(f"{tuned.unsent}; `clplat resume {tuned.folder}` sends it.", soft_wrap=True)


def _first_points(study: StudyConfig, protocol: Protocol) -> list[dict[str, Any]]:
    """The default settings, and after them the points of a grid in an order of the sampler's seed."""
    import random

    default = protocol.space.default(protocol.resolve)
    if study.tune.sampler != "grid":
        return [default]
    grid = [point for point in protocol.space.grid() if point != default]
    random.Random(study.tune.sampler_seed).shuffle(grid)
    return [default, *grid][: study.tune.trials]


def _facts(study: StudyConfig, protocol: Protocol) -> dict[str, Any]:
    """What must be the same when a tune is resumed or joined, flat and plain."""
    data = hashlib.sha256(json.dumps(list(protocol.streams), sort_keys=True).encode()).hexdigest()[:16]
    fixed = {key: value for key, value in plain(study.tune).items() if key not in ("trials", "timeout", "storage")}
    facts: Mapping[str, Any] = {
        **scientific(protocol.resolve({})), **flat({"the report's stream": plain(protocol.report.stream)}),
        **flat({"space": study.space, "tune": fixed}), "seeds": study.seeds,
        "the data that are tuned on": data,
    }  # fmt: skip
    return json.loads(
        json.dumps({key: value for key, value in facts.items() if key not in ("study", "variant", "seed")})
    )
