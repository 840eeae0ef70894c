"""MLflow's side of the record: each run's journal is sent by a background thread, from where it last stopped.

The journal is the truth. `mlflow.json` in a run folder holds the server, the id of the MLflow run there, how far the
journal has been sent and whether files and status have followed it; times come from the journal, so a point that is
sent twice is the same point and is kept once.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from clplat.config import RunConfig, TrackingConfig, load_run
from clplat.errors import ClplatError
from clplat.journal import NAME, read
from clplat.mlflow_store import absolute, client, experiment_id, short
from clplat.mlflow_view import COLOUR, colours
from clplat.points import Point, Translator, safe_key
from clplat.run_note import NOTE, run_note
from clplat.storage import read_json, write_json
from clplat.study_file import record_name

CHUNK = 900
"""Points in one request; MLflow takes 1000."""
SHARE = 0.005
"""Of a core at most that sending may take while a run goes on."""
OFTEN, SELDOM = 10.0, 60.0
"""Seconds between two sendings where a store is fast, and at most."""
STUDY_STATE, RUN_STATE = "study.json", "mlflow.json"


class Feed:
    """Sends one run's journal to MLflow while the run goes on; never holds training up."""

    def __init__(self, folder: Path, tracking: TrackingConfig) -> None:
        self.folder, self.tracking = folder, tracking
        state, uri = read_json(folder / RUN_STATE) or {}, absolute(tracking.uri)
        # Another server than before starts with nothing.
        fresh = {"uri": uri, "run_id": None, "offset": 0, "ended": False}
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
        self._samples: list[Point] = []

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

    def finish(self, status: str) -> bool:
        """Send everything there is, now; whether that worked."""
        return self._try(lambda: self._send_new(status)) and self._try(lambda: self._end(status))

    def _live(self) -> None:
        wait = 1.0
        while not self._closing.wait(wait):
            began = time.thread_time()
            if self._monitor is not None:
                # What a driver of the machine raises loses its sample alone.
                with contextlib.suppress(Exception):
                    self._samples += self._sample()
            if self._try(self._send_new):
                self._start_monitor()
                # Every sending is a few transactions, dearer than what they write: few of many points cost less.
                wait = min(SELDOM, max(OFTEN, (time.thread_time() - began) / SHARE))
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
        connection, study = client(self.tracking.uri), self._study()
        above = self._above(study)
        if self._state["run_id"] is None:
            config = self._config
            # Also a run that fails before it can describe itself must be found under its variant.
            tags = {"study": config.study, "variant": config.variant, "seed": str(config.seed), "kind": "run"}
            ours = study.get("experiment_name") == self.tracking.experiment
            where = study["experiment"] if ours else experiment_id(connection, self.tracking)
            run = connection.create_run(where, start_time=self._began(), tags=tags | above, run_name=self.folder.name)
            self._note(run_id=run.info.run_id)
            self._fresh = True
        else:
            # Set at every start: the study's run may have come later than this one, when its server came back.
            self._log(connection, {}, above)
            connection.update_run(self._state["run_id"], status="RUNNING")
            self._note(ended=False)
        self._client = connection

    def _note(self, **news: Any) -> None:
        """Write down how far the record has come."""
        self._state |= news
        write_json(self.folder / RUN_STATE, self._state)

    @cached_property
    def _config(self) -> RunConfig:
        return load_run(self.folder / "config.yaml")

    def _began(self) -> int | None:
        """When the run began, in ms, as far as its journal tells."""
        return next((int(entry["t"]) for entry in read(self.folder)), None)

    def _study(self) -> dict[str, Any]:
        """The study as this server knows it; empty where it does not."""
        study = read_json(self.folder.parent / STUDY_STATE) or {}
        return study if study.get("uri") == self._state["uri"] else {}

    def _above(self, study: Mapping[str, Any]) -> dict[str, str]:
        """What puts the run below its study, and what it is searched and told apart by there."""
        if not study:
            return {}
        tags = {"mlflow.parentRunId": study["run_id"], "study_run": record_name(self.folder.parent)}
        colour = colours(study.get("variants", [])).get(self._config.variant)
        return tags | ({COLOUR: colour} if colour else {})

    def _log(
        self, connection: Any, params: Mapping[str, str], tags: Mapping[str, str], points: Sequence[Point] = ()
    ) -> None:
        """All in one request: each is a transaction of the store or several, dearer than what it writes."""
        from mlflow.entities import Metric, Param, RunTag

        connection.log_batch(
            self._state["run_id"], [Metric(key, value, moment, step) for key, value, moment, step in points],
            [Param(key, value) for key, value in params.items()], [RunTag(key, value) for key, value in tags.items()],
        )  # fmt: skip

    def _start_monitor(self) -> None:
        """MLflow's monitors of the machine, without its thread: that asks for the run and writes to it at every sample,
        which costs as much as all the rest, while here samples go with what is sent anyway."""
        if self._monitor is None and self.tracking.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self._state["run_id"])
            # From here on: the first of all is of no time.
            self._sample()

    def _sample(self) -> list[Point]:
        """What the machine has done since the last sample; its step is seconds since the run began."""
        self._monitor.collect_metrics()
        found = self._monitor.aggregate_metrics()
        for one in self._monitor.monitors:
            one.clear_metrics()
        now = int(time.time() * 1000)
        began = self._began() or now
        return [(f"system/{name}", float(value), now, (now - began) // 1000) for name, value in found.items()]

    def _send_new(self, status: str = "") -> None:
        """Send the whole lines after the last offset, in chunks; the offset moves with every success.

        `status`: how the run ended, and what tells of that goes along.
        """
        self._connect()
        try:
            self._send_lines(status)
        except Exception:
            # What was translated but not sent has to be translated again, rows of the table included.
            self._translator, self._translated, self._inputs, self._reason = Translator(), 0, [], ""
            self._facts = {}, {}
            raise

    def _send_lines(self, status: str) -> None:
        with (self.folder / NAME).open("rb") as file:
            points = list(self._samples)
            file.seek(self._translated)
            while line := file.readline():
                if not line.endswith(b"\n"):
                    break
                entry, place = json.loads(line), file.tell()
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
            if status:
                self._facts[1][NOTE] = run_note(self.folder, self._config, self._state["run_id"])
            if status == "PRUNED":
                # MLflow has no such status: there the run was ended before its end, and a tag says why.
                self._facts[1]["pruned"] = "true"
            self._send_points(points, self._translated)
            self._samples.clear()

    def _send_points(self, points: list[Point], offset: int) -> None:
        """Send what has come together, facts with the first points, and note how far that goes."""
        self._send_inputs()
        params, tags = self._new_facts()
        for start in range(0, max(1, len(points)), CHUNK):
            part = points[start : start + CHUNK]
            if params or tags or part:
                self._log(self._client, params, tags, part)
            params, tags = {}, {}
        self._facts = {}, {}
        if offset > self._state["offset"]:
            self._note(offset=offset)

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

    def _new_facts(self) -> tuple[dict[str, str], dict[str, str]]:
        """MLflow keeps a parameter's first value; what a resumed run may change (devices, …) is told in tags."""
        params, tags = self._facts
        known = self._client.get_run(self._state["run_id"]).data.params if params and not self._fresh else {}
        changed = {f"resumed.{key}": v for key, v in params.items() if known.get(key, v) != v}
        return {key: v for key, v in params.items() if key not in known}, tags | changed

    def _end(self, status: str) -> None:
        if (self.folder / "artifacts").is_dir():
            self._client.log_artifacts(self._state["run_id"], str(self.folder / "artifacts"))
        # The time of the last entry, so that a record sent later does not stretch the run.
        self._client.set_terminated(
            self._state["run_id"], status="KILLED" if status == "PRUNED" else status, end_time=self._last_time or None
        )
        self._note(ended=True)
