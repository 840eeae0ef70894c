"""Studies in MLflow: their parent runs, sending what was left behind, and fetching a run to do it again."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from clplat.config import RunConfig, load_run, parse
from clplat.databases import SQLITE, refuse_missing
from clplat.errors import ClplatError, ConfigError, RunBusyError
from clplat.journal import ENDED, NAME, last_status
from clplat.mlflow_store import absolute, client, experiment_id, short
from clplat.mlflow_view import add_view
from clplat.result_table import ResultTable
from clplat.storage import read_json, write_json, writing
from clplat.study_file import load_study, record_name, run_folders
from clplat.tracking import RUN_STATE, STUDY_STATE, Feed
from clplat.yaml_text import parse_yaml


def start_study(folder: Path) -> None:
    """Make the study's parent run, or take it up again; a server that is away does not stop the study."""
    try:
        _start(folder)
    except ClplatError as error:
        print(f"{error}; the study goes on, and its record waits in {folder}.", file=sys.stderr)


def _start(folder: Path) -> None:
    study = load_study(folder / "study.yaml")
    state = read_json(folder / STUDY_STATE) or {}
    try:
        connection = client(study.tracking.uri)
        if state.get("uri") != study.tracking.uri:
            where = experiment_id(connection, study.tracking)
            variants = list(study.variants) or [study.name]
            tags = {
                "study": study.name, "kind": "study", "study_run": record_name(folder),
                "baseline": study.baseline or "", "folder": str(folder.resolve()),
                "variants": json.dumps(variants), "seeds": json.dumps(study.seeds),
                "stream": study.stream.class_path.rpartition(".")[2],
                "architecture": study.architecture.class_path.rpartition(".")[2],
            }  # fmt: skip
            run = connection.create_run(where, tags=tags, run_name=record_name(folder))
            state = {
                "run_id": run.info.run_id, "uri": study.tracking.uri, "variants": variants,
                "experiment": where, "experiment_name": study.tracking.experiment,
            }  # fmt: skip
            write_json(folder / STUDY_STATE, state)
            connection.log_artifact(state["run_id"], str(folder / "study.yaml"))
            add_view(connection, where, record_name(folder), int(time.time() * 1000))
        connection.update_run(state["run_id"], status="RUNNING")
    except Exception as error:
        raise ClplatError(f"MLflow at {study.tracking.uri} cannot be reached ({short(error)})") from error


def finish_study(folder: Path, statuses: list[str]) -> None:
    """Give the parent run its status: FINISHED when all runs are or were pruned, KILLED when some can be resumed, else
    FAILED."""
    state = read_json(folder / STUDY_STATE) or {}
    if "run_id" in state:
        found = set(statuses) - set(ENDED)
        status = "FINISHED" if not found else "FAILED" if found == {"FAILED"} else "KILLED"
        # A server that is gone by now gets the status with `clplat sync`.
        with contextlib.suppress(Exception):
            client(state["uri"]).set_terminated(state["run_id"], status=status)


def settle_study(folder: Path) -> None:
    """Give the parent run the status that its runs have, unless one of them is under way: whoever ends it does."""
    from clplat.lease import is_busy

    runs = run_folders(folder)
    if not any(is_busy(run) for run in runs):
        finish_study(folder, [last_status(run) for run in runs])


def send_unsent(runs: list[Path]) -> str:
    """Send what runs could not send themselves because their process died or the server was away for a while.

    What stays behind, in a sentence; empty when MLflow has it all or another process is at it.
    """
    from clplat.lease import held

    for run in runs:
        written, state = (run / NAME).stat().st_size if (run / NAME).is_file() else 0, read_json(run / RUN_STATE) or {}
        # A record of before this was noted has ended.
        if written and (written > state.get("offset", 0) or not state.get("ended", True)):
            try:
                with held(run):
                    _send(run)
            except RunBusyError:
                continue
            except ClplatError as error:
                return str(error)
            except OSError as error:
                return f"{run}: cannot be written ({error.strerror or error})"
    return ""


def sync(target: str | Path, uri: str | None = None) -> int:
    """Send what MLflow lacks of a run or a study, to `uri` from now on if given; how many runs were sent.

    Raises when the server is away. A run that is under way is left to the process that works on it.
    """
    from clplat.lease import held

    folder = Path(target)
    is_study = (folder / "study.yaml").is_file()
    if not is_study and not (folder / "config.yaml").is_file():
        raise ConfigError(f"{target}: neither a run folder (config.yaml) nor a study folder (study.yaml)")
    runs = run_folders(folder) if is_study else [folder]
    if uri is not None:
        _send_elsewhere(folder, runs, absolute(uri))
    if is_study:
        _forget_lost(folder / STUDY_STATE, load_study(folder / "study.yaml").tracking.uri)
        _start(folder)
    sent = 0
    for run in runs:
        if (run / NAME).is_file():
            try:
                with held(run):
                    _forget_lost(run / RUN_STATE, load_run(run / "config.yaml").tracking.uri)
                    _send(run)
                sent += 1
            except RunBusyError:
                continue
    if is_study:
        settle_study(folder)
    return sent


def _send(run: Path) -> None:
    if not (run / "artifacts" / "results.csv").is_file():
        # The process died, or the disk was full, before it could write them.
        from clplat.record import write_artifacts

        with writing(run, f"`clplat sync {run}` sends it"):
            write_artifacts(run)
    feed, status = Feed(run, load_run(run / "config.yaml").tracking), last_status(run)
    if not feed.finish("KILLED" if status in ("RUNNING", "WAITING") else status):
        raise ClplatError(f"MLflow at {feed.tracking.uri} has not got the whole record ({feed.trouble})")


def _forget_lost(state: Path, uri: str) -> None:
    """Remove what is noted of a run that MLflow has no more, since its database was removed: it is told all anew."""
    from mlflow.exceptions import MlflowException

    run_id = (read_json(state) or {}).get("run_id")
    if run_id is None:
        return
    try:
        client(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            state.unlink()
    except Exception as error:
        raise ClplatError(f"MLflow at {uri} cannot be reached ({short(error)})") from error


def _send_elsewhere(folder: Path, runs: list[Path], uri: str) -> None:
    """Point a study's files at another server; its state files, which name the old one, are void by that."""
    for place in [folder, *runs]:
        for name in ("study.yaml", "config.yaml"):
            if (place / name).is_file():
                data = parse_yaml((place / name).read_text())
                data.setdefault("tracking", {})["uri"] = uri
                (place / name).write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True, kw_only=True)
class Record:
    """What MLflow holds of a run: enough to run it again."""

    config: RunConfig
    table: ResultTable


def default_uri() -> str:
    """Where studies are looked for when nothing else is said; looking for one makes no database."""
    if "MLFLOW_TRACKING_URI" in os.environ:
        return os.environ["MLFLOW_TRACKING_URI"]
    refuse_missing(here := f"{SQLITE}mlflow.db")
    return here


def fetch_run(run: str) -> Record:
    """A run's configuration and result table out of MLflow, by run id or run folder."""
    folder = Path(run)
    state = read_json(folder / RUN_STATE) if folder.is_dir() else None
    uri = load_run(folder / "config.yaml").tracking.uri if state else default_uri()
    run_id = state["run_id"] if state else run
    try:
        connection = client(uri)
        files = Path(connection.download_artifacts(run_id, ""))
    except Exception as error:  # noqa: BLE001 - missing runs and dead servers raise different types
        raise ConfigError(f"run {run!r}: MLflow at {uri} does not give it ({short(error)})") from error
    if not (files / "config.yaml").is_file() or not (files / "results.csv").is_file():
        raise ConfigError(f"run {run!r}: MLflow has no config.yaml and results.csv of it; it has not finished")
    data = parse_yaml((files / "config.yaml").read_text())
    return Record(config=parse(RunConfig, data), table=ResultTable.from_csv(files / "results.csv"))


def folder_of_run(run_id: str) -> Path | None:
    """The folder of a run or study that MLflow knows by this id; None when it knows none."""
    try:
        found = client(default_uri()).get_run(run_id)
    except Exception:  # noqa: BLE001 - an id that is none is an answer, not a failure
        return None
    folder = found.data.tags.get("folder")
    return Path(folder) if folder else None
