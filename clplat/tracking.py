"""MLflow's side of the record: each run's journal is sent by a background thread, from where it last stopped.

The journal is the truth. `mlflow.json` in a run folder holds the server, the id of the MLflow run there and how far
the journal has been sent; times come from the journal, so a point that is sent twice is the same point and is kept
once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clplat.config import TrackingConfig, load_run
from clplat.errors import ClplatError
from clplat.journal import NAME, read
from clplat.mlflow_view import COLOUR, KIND, colours
from clplat.points import Translator, safe_key
from clplat.run_note import NOTE, run_note
from clplat.storage import read_json, write_json

CHUNK = 900
"""Points in one request; MLflow takes 1000."""
STUDY_STATE, RUN_STATE = "study.json", "mlflow.json"


def quiet_mlflow() -> None:
    """Before MLflow is imported: no telemetry, no bars, and seconds rather than minutes for a dead server."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


def client(uri: str) -> Any:
    """An MLflow client that is quiet, sends no telemetry, and gives up on a dead server within seconds."""
    quiet_mlflow()
    import mlflow

    # What the store raises is caught and said once; its own log would say it, with the traceback, at every attempt.
    for name, level in {"mlflow": "ERROR", "alembic": "ERROR", "mlflow.store.db.utils": "CRITICAL"}.items():
        logging.getLogger(name).setLevel(level)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


def absolute(uri: str) -> str:
    """The URI with a relative SQLite file made absolute, so that it means the same from any folder."""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def experiment_id(connection: Any, tracking: TrackingConfig) -> str:
    """The experiment, made if it is new; a local database keeps its artifacts in a folder beside it."""
    found = connection.get_experiment_by_name(tracking.experiment)
    if found is not None:
        return found.experiment_id
    uri = absolute(tracking.uri)
    place = None
    if uri.startswith("sqlite:///"):
        place = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / tracking.experiment).as_uri()
    try:
        return connection.create_experiment(tracking.experiment, artifact_location=place, tags=KIND)
    except Exception:
        # Another process made it in the meantime.
        found = connection.get_experiment_by_name(tracking.experiment)
        if found is None:
            raise
        return found.experiment_id


class Feed:
    """Sends one run's journal to MLflow while the run goes on; never holds training up."""

    def __init__(self, folder: Path, tracking: TrackingConfig) -> None:
        self.folder, self.tracking = folder, tracking
        state, uri = read_json(folder / RUN_STATE) or {}, absolute(tracking.uri)
        # Another server than before starts with nothing.
        fresh = {"uri": uri, "run_id": None, "offset": 0}
        self._state: dict[str, Any] = state if state.get("uri") == uri else fresh
        self._client: Any = None
        self._translator = Translator()
        self._translated = self._last_time = 0
        self._inputs: list[Any] = []
        self._reason, self._fresh = "", False
        self._facts: tuple[dict[str, str], dict[str, str]] = {}, {}
        """Parameters and tags that wait for the next request."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mlflow", daemon=True)
        self.trouble: str | None = None
        """Why the last attempt failed, None after one that did not; whoever ends a study says so once."""
        self._monitor: Any = None

    def start(self) -> None:
        """Begin sending in the background."""
        # MLflow imports this package, which hooks into every look-up of a version before it is whole: were it first
        # imported in the other thread, a look-up here at that moment would fail. Later MLflows may do without it.
        with contextlib.suppress(ImportError):
            import importlib_metadata  # noqa: F401
        self._thread.start()

    def close(self, status: str) -> None:
        """Send what is left, upload artifacts, and give the MLflow run its true status."""
        self.leave()
        self.finish(status)

    def leave(self) -> None:
        """Send nothing more."""
        self._closing.set()
        self._thread.join()
        if self._monitor is not None:
            self._monitor.finish()

    def finish(self, status: str) -> bool:
        """Send everything there is, now; whether that worked."""
        if not self._try(self._send_new):
            return False
        return self._try(lambda: self._end(status))

    def _live(self) -> None:
        wait = 1.0
        while not self._closing.wait(wait):
            began = time.thread_time()
            if self._try(self._send_new):
                # Sending takes a hundredth of a core at most, also where a store is slow.
                wait = min(10.0, max(4.0, 100 * (time.thread_time() - began)))
                self._start_monitor()
            else:
                wait = min(30.0, 2 * wait)

    def _try(self, action: Any) -> bool:
        try:
            action()
        except ClplatError:
            raise
        except Exception as error:  # noqa: BLE001 - a server can fail in any way; the run must not
            self.trouble = short(error)
            return False
        self.trouble = None
        return True

    def _connect(self) -> None:
        if self._client is not None and self._state["run_id"] is not None:
            return
        connection, above = client(self.tracking.uri), self._above()
        if self._state["run_id"] is None:
            config = load_run(self.folder / "config.yaml")
            # Also a run that fails before it can describe itself must be found under its variant.
            tags = {"study": config.study, "variant": config.variant, "seed": str(config.seed), "kind": "run"}
            started = next((int(entry["t"]) for entry in read(self.folder)), None)
            run = connection.create_run(
                experiment_id(connection, self.tracking), start_time=started, tags=tags | above,
                run_name=self.folder.name,
            )  # fmt: skip
            self._state["run_id"], self._fresh = run.info.run_id, True
            write_json(self.folder / RUN_STATE, self._state)
        else:
            # Set at every start: the study's run may have come later than this one, when its server came back.
            self._log(connection, {}, above)
            connection.update_run(self._state["run_id"], status="RUNNING")
        self._client = connection

    def _above(self) -> dict[str, str]:
        """What puts the run below its study, and what it is searched and told apart by there."""
        study = read_json(self.folder.parent / STUDY_STATE) or {}
        if study.get("uri") != self._state["uri"]:
            return {}
        tags = {"mlflow.parentRunId": study["run_id"], "study_run": self.folder.parent.name}
        colour = colours(study.get("variants", [])).get(load_run(self.folder / "config.yaml").variant)
        return tags | ({COLOUR: colour} if colour else {})

    def _log(self, connection: Any, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Parameters and tags in one request: each is a transaction of the store, dearer than what it writes."""
        from mlflow.entities import Param, RunTag

        connection.log_batch(
            self._state["run_id"], params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )  # fmt: skip

    def _start_monitor(self) -> None:
        if self._monitor is None and self.tracking.system_metrics and not self._closing.is_set():
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self._state["run_id"], resume_logging=True)
            self._monitor.start()

    def _send_new(self) -> None:
        """Send the whole lines after the last offset, in chunks; the offset moves with every success."""
        self._connect()
        try:
            self._send_lines()
        except Exception:
            # What was translated but not sent has to be translated again, rows of the table included.
            self._translator, self._translated, self._inputs, self._reason = Translator(), 0, [], ""
            self._facts = {}, {}
            raise

    def _send_lines(self) -> None:
        with (self.folder / NAME).open("rb") as file:
            points: list[Any] = []
            while line := file.readline():
                if not line.endswith(b"\n"):
                    break
                entry, place = json.loads(line), file.tell()
                if place > self._translated:
                    found = list(self._translator.points(entry))
                    self._translated, self._last_time = place, int(entry["t"])
                    if place > self._state["offset"]:
                        points += found
                        self._send_entry(entry)
                    if entry["kind"] == "status":
                        self._reason = entry["reason"]
                if len(points) >= CHUNK:
                    self._send_points(points, place)
                    points = []
            self._send_points(points, self._translated)

    def _send_points(self, points: list[Any], offset: int) -> None:
        from mlflow.entities import Metric

        self._send_facts()
        self._send_inputs()
        for start in range(0, len(points), CHUNK):
            part = points[start : start + CHUNK]
            metrics = [Metric(key, value, moment, step) for key, value, moment, step in part]
            self._client.log_batch(self._state["run_id"], metrics=metrics)
        if offset > self._state["offset"]:
            self._state["offset"] = offset
            write_json(self.folder / RUN_STATE, self._state)

    def _send_entry(self, entry: dict[str, Any]) -> None:
        """Take up what is no point; it goes with the next request."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        params, tags = self._facts
        match entry["kind"]:
            case "params":
                params |= {safe_key(key): value[:6000] for key, value in entry["values"].items()}
            case "tags":
                tags |= {safe_key(key): str(value)[:5000] for key, value in entry["values"].items()}
            case "status" if entry["reason"] or self._reason:
                # A reason of before is no reason of now: empty where the run goes on, or has finished.
                tags["status_reason"] = entry["reason"][:5000]
            case "dataset":
                data = Dataset(
                    name=entry["name"], digest=entry["digest"], source_type="clplat",
                    source=entry.get("source", entry["name"]), profile=entry.get("profile"),
                )  # fmt: skip
                self._inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", entry["context"])]))

    def _send_inputs(self) -> None:
        """Data sets, all in one request: one for each would be a tenth of what recording a short run takes."""
        if not self._inputs:
            return
        run_id = self._state["run_id"]
        try:
            self._client.log_inputs(run_id, self._inputs)
        except Exception as error:
            # Two runs that register one data set at the same time collide in the store, once.
            if "UNIQUE" not in str(error):
                raise
            self._client.log_inputs(run_id, self._inputs)
        self._inputs = []

    def _send_facts(self) -> None:
        """MLflow keeps a parameter's first value; what a resumed run may change (devices, …) is told in tags."""
        params, tags = self._facts
        if not params and not tags:
            return
        known = self._client.get_run(self._state["run_id"]).data.params if params and not self._fresh else {}
        changed = {f"resumed.{key}": v for key, v in params.items() if known.get(key, v) != v}
        self._log(self._client, {key: v for key, v in params.items() if key not in known}, tags | changed)
        self._facts = {}, {}

    def _end(self, status: str) -> None:
        if (self.folder / "artifacts").is_dir():
            self._client.log_artifacts(self._state["run_id"], str(self.folder / "artifacts"))
        self._client.set_tag(self._state["run_id"], NOTE, run_note(self.folder, self._state["run_id"]))
        if status == "PRUNED":
            # MLflow has no such status: there the run was ended before its end, and a tag says why.
            self._client.set_tag(self._state["run_id"], "pruned", "true")
            status = "KILLED"
        # The time of the last entry, so that a record sent later does not stretch the run.
        self._client.set_terminated(self._state["run_id"], status=status, end_time=self._last_time or None)


def short(error: Exception) -> str:
    """An error on one line, cut to what fits into another message; of a dead connection only what the system said."""
    text = re.sub(r" ?\(Background on this error at: \S+\)", "", " ".join(str(error).split()))
    system = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(timed out)", text)
    return next(filter(None, system.groups())).lower() if system else text[:200] or type(error).__name__
