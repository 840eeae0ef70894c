"""What a search leaves: front.csv, best.yaml, figures and tuning.html in its folder, and the same in MLflow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clplat.config import StudyConfig, plain
from clplat.mlflow_store import client, short
from clplat.mlflow_view import add_view
from clplat.points import safe_key
from clplat.run_note import NOTE, escaped
from clplat.storage import read_json, write_json, writing
from clplat.study import Study
from clplat.study_file import expand, record_name
from clplat.study_record import start_study
from clplat.tracking import STUDY_STATE
from clplat.tuning import front
from clplat.tuning.front import Row
from clplat.tuning.gain import Gain
from clplat.tuning.note import search_params, tune_note
from clplat.tuning.protocol import Protocol
from clplat.tuning.trials import Trials

TAG_LENGTH = 5000
"""What MLflow keeps of a tag."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a tune stands: `status` FINISHED, KILLED (it can be resumed) or FAILED, its trials, the best and its gain."""

    folder: Path
    status: str
    code: int
    rows: list[Row] = field(default_factory=list)
    best: Row | None = None
    gains: list[Gain] = field(default_factory=list)
    report: Study | None = None
    text: str = ""
    """What was gained, or why nothing can be said yet."""
    unsent: str = ""
    """What MLflow has not got, in a sentence; empty when it has all."""


def write_front(folder: Path, protocol: Protocol, rows: Sequence[Row], objectives: Mapping[str, int]) -> None:
    """Write front.csv (every trial, the front marked), best.yaml, and front/tNNNN.yaml for each trial of the front."""
    best = front.best(rows, objectives)
    with writing(folder):
        front.write_csv(rows, list(objectives), list(protocol.space.dimensions), folder / "front.csv")
        (folder / "front").mkdir(exist_ok=True)
        for old in (folder / "front").glob("*.yaml"):
            old.unlink()
        for row in rows:
            if row.on_front:
                _write_settings(folder / "front" / f"{row.name}.yaml", f"{row.name}", protocol, row)
        if best is not None:
            _write_settings(folder / "best.yaml", "best", protocol, best)


def _write_settings(path: Path, name: str, protocol: Protocol, row: Row) -> None:
    """A trial's settings as a study of the full stream, with the report's seeds, ready for `clplat run`."""
    changed = dataclasses.replace(protocol.report, variants={"tuned": protocol.space.changes(row.settings)})
    run = plain(expand(changed)[0])
    kept = {key: value for key, value in plain(protocol.report).items() if key not in ("space", "tune", "known_good")}
    data = kept | {key: run[key] for key in kept if key in run} | {"name": f"{protocol.report.name}_{name}"}
    reached = ", ".join(f"{key} {value:.4g}" for key, value in row.objectives.items())
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    path.write_text(f"# Trial {row.name} of a search on {protocol.tuned_on}: {reached} there\n{text}", encoding="utf-8")


def start_record(folder: Path, study: StudyConfig, protocol: Protocol, trials: Trials) -> None:
    """The search's parent run in MLflow: made, taken up again, or shared with other tunes of one storage and server."""
    shared = trials.study.user_attrs.get("mlflow", {})
    if shared.get("uri") == study.tracking.uri and not (folder / STUDY_STATE).is_file():
        write_json(folder / STUDY_STATE, shared)
    start_study(folder)
    state = read_json(folder / STUDY_STATE)
    if state is None:
        return
    if shared != state:
        trials.study.set_user_attr("mlflow", state)
    text = f"The search is under way, or was stopped without a word: `clplat resume {folder}` goes on with it."
    tags = protocol.tags() | {
        "tune": "true", "sampler": study.tune.sampler, "objectives": ", ".join(study.tune.objectives),
        NOTE: escaped(text), "finding": text,
    }  # fmt: skip
    columns = [
        *(("metrics", name) for name in study.tune.objectives), ("tags", "pruned"),
        *(("params", safe_key(key)) for key in protocol.space.dimensions), ("tags", "status_reason"),
    ]  # fmt: skip
    with contextlib.suppress(Exception):  # a server that is away now is told at the end
        connection = client(state["uri"])
        _log(connection, state["run_id"], tags, params=search_params(protocol, plain(study.tune)))
        add_view(connection, state["experiment"], record_name(folder), int(time.time() * 1000), columns)


def send_record(known: Tuned, protocol: Protocol, *, ended: bool) -> str:
    """Tell the parent run its trials, the gain and what it means, and attach the files; `ended` with its report.

    What MLflow has not got, in a sentence; empty when it has it all.
    """
    state = read_json(known.folder / STUDY_STATE)
    if state is None:
        return "MLflow has not got the search"
    names: list[str] = []
    for row in known.rows:
        if row.settings and len(json.dumps([*names, row.name])) <= TAG_LENGTH:
            names.append(row.name)
    numbers = {f"gain/{g.metric}": g.difference.mean for g in known.gains}
    numbers |= {f"gain/{g.metric}_half_width": g.difference.half for g in known.gains}
    reported = read_json(known.report.folder / STUDY_STATE) if known.report else None
    try:
        connection, run_id = client(state["uri"]), state["run_id"]
        _attach(connection, run_id, known.folder)
        there = f"#/experiments/{state['experiment']}/runs/{reported['run_id']}" if reported else ""
        note = tune_note(known.folder, run_id, protocol, known.rows, known.best, known.text, there)
        tags = protocol.tags() | {"variants": json.dumps(names), NOTE: note, "finding": known.text[:1000]}
        _log(connection, run_id, tags, metrics={k: v for k, v in numbers.items() if math.isfinite(v)})
        if reported:
            _log(connection, reported["run_id"], protocol.tags() | {"tune_run": run_id})
        if ended:
            # A trial that failed is a result of a search that did not.
            connection.set_terminated(run_id, status="FINISHED")
    except Exception as error:  # noqa: BLE001 - a server can fail in any way; what was found is on disk
        return f"MLflow at {state['uri']} has not got all of the search ({short(error)})"
    return ""


def _log(
    connection: Any,
    run_id: str,
    tags: Mapping[str, str],
    *,
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """In one request."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    connection.log_batch(
        run_id, [Metric(key, value, now, 0) for key, value in (metrics or {}).items()],
        [Param(safe_key(key), value[:6000]) for key, value in (params or {}).items()],
        [RunTag(key, value) for key, value in tags.items()],
    )  # fmt: skip


def _attach(connection: Any, run_id: str, folder: Path) -> None:
    for name in ("tune.yaml", "study.yaml", "front.csv", "best.yaml", "tuning.html"):
        if (folder / name).is_file():
            connection.log_artifact(run_id, str(folder / name))
    for name in ("figures", "front"):
        if (folder / name).is_dir():
            connection.log_artifacts(run_id, str(folder / name), name)
