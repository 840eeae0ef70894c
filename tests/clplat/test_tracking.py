"""MLflow gets the whole record once: whatever dies, whoever is away, however often it is sent."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console
from studies import REPLAY, run_folder, study

import clplat
import clplat.metrics
from clplat import page, report, tracking
from clplat.execution import execute
from clplat.journal import read, table
from clplat.mlflow_store import client
from clplat.points import Translator
from clplat.study import conclude
from clplat.study_record import sync
from clplat.study_results import journal_results, load_study_results, results_frame
from clplat.tracking import RUN_STATE

TRACKED = {"enabled": True, "log_every": 5, "system_metrics": False}
DEAD = "http://127.0.0.1:9"


def tracked(uri: str, **changes: Any) -> dict[str, Any]:
    return study(tracking=TRACKED | {"uri": uri}, **changes)


def run_of(folder: Path) -> Any:
    state = json.loads((folder / RUN_STATE).read_text())
    return client(state.get("uri") or mlflow.get_tracking_uri()).get_run(state["run_id"])


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client(uri).get_metric_history(run_id, key))


def test_a_run_is_one_mlflow_run_with_params_tags_curves_tables_data_and_its_true_status(
    store: str, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, tracked(store, strategies={"replay": REPLAY}))
    assert execute(folder).status == "FINISHED"
    run = run_of(folder)
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    for name in ("stream", "architecture", "strategy", "seed", "task_order", "fidelity", "config_hash", "budget"):
        assert tags[name], name
    assert "git_sha" in tags
    assert run.data.params["training.batch_size"] == "16"
    assert [step for step, _ in history(store, run.info.run_id, "train/loss")] == [
        5,
        10,
        12,
        15,
        20,
        24,
        25,
        30,
        35,
        36,
    ]
    scores = table(folder).matrix("accuracy")
    first = table(folder).tasks()[0]
    assert history(store, run.info.run_id, f"eval/{first}/accuracy") == [
        (12 * row, scores[row, 0]) for row in (1, 2, 3)
    ]
    assert run.data.metrics["cumulative_forgetting"] == pytest.approx(
        clplat.metrics.summary(table(folder))["cumulative_forgetting"]
    )
    names = {file.path for file in client(store).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "results.csv", "heatmap.svg", "scores.svg", "environment.txt"} <= names
    assert {item.dataset.name for item in run.inputs.dataset_inputs} == {
        f"{task}/{part}" for task in table(folder).tasks() for part in ("train", "test")
    }


def test_a_record_that_is_sent_twice_has_no_point_twice(store: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, tracked(store))
    execute(folder)
    run_id = run_of(folder).info.run_id
    before = history(store, run_id, "train/loss")
    state = json.loads((folder / RUN_STATE).read_text())
    (folder / RUN_STATE).write_text(json.dumps(state | {"offset": 0}))
    assert sync(folder) == 1
    assert history(store, run_id, "train/loss") == before
    assert len(before) == len({step for step, _ in before})


def test_a_dead_server_stops_nothing_and_sync_sends_everything_later(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = clplat.run(tracked(DEAD, variants={"naive": {}}), quiet=True)
    assert done.code == 0
    said = capsys.readouterr().err
    assert said.count("cannot be reached") == 1 and "urllib3" not in said and "Pool" not in said
    assert "connection refused" in done.unsent
    console = Console(record=True, width=100)
    conclude(done, console)
    shown = console.export_text()
    assert shown.count("clplat sync") == 1 and "final score" in shown and (done.folder / "report.html").is_file()
    assert sync(done.folder, store) == 1
    results = load_study_results(str(done.folder))
    assert [run.status for run in results.runs] == ["FINISHED"]
    local = journal_results(done.folder)
    assert local.runs[0].metrics == results.runs[0].metrics
    assert results.runs[0].table is not None
    assert str(results.runs[0].table.to_rows()) == str(table(done.folder / "naive-s0").to_rows())
    points = sum(len(entry["values"]) for entry in read(done.folder / "naive-s0") if entry["kind"] == "metric")
    sent = results.runs[0].metrics
    assert points and "cost/steps" in sent and sent["cost/steps"] == 36


def test_a_server_that_goes_away_mid_run_loses_no_point(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_folder(tmp_path, tracked(store), "whole")
    execute(whole)
    calls = 0
    original = mlflow.MlflowClient.log_batch

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise ConnectionError("gone")
        original(self, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", failing)
    monkeypatch.setattr(tracking, "CHUNK", 7)
    folder = run_folder(tmp_path, tracked(store), "shaky")
    assert execute(folder).status == "FINISHED"
    monkeypatch.undo()
    sync(folder)
    ours, theirs = run_of(folder), run_of(whole)
    timed = ("cost/", "system/")
    assert ours.data.metrics.keys() == theirs.data.metrics.keys()
    for key in ours.data.metrics:
        if not key.startswith(timed):
            assert history(store, ours.info.run_id, key) == history(store, theirs.info.run_id, key), key


def test_failed_and_killed_runs_are_never_left_running(store: str, tmp_path: Path) -> None:
    (tmp_path / "endings.py").write_text(
        "import os, signal\n"
        "from clplat.strategies.base import Strategy\n"
        "class Broken(Strategy):\n"
        "    def task_end(self, task):\n"
        "        raise RuntimeError('no idea')\n"
        "class Stopped(Strategy):\n"
        "    def task_end(self, task):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
    )
    for name, status in (("Broken", "FAILED"), ("Stopped", "KILLED")):
        folder = run_folder(tmp_path, tracked(store, strategies={"s": {"class_path": f"endings.{name}"}}), name)
        assert execute(folder).status == status
        run = run_of(folder)
        assert run.info.status == status and run.data.tags["status_reason"]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(store: str, tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(
        "import os, pathlib, signal\n"
        "from clplat.strategies.base import Strategy\n"
        "class Once(Strategy):\n"
        "    def task_end(self, task):\n"
        "        if not pathlib.Path('stopped').exists():\n"
        "            pathlib.Path('stopped').touch()\n"
        "            signal.raise_signal(signal.SIGTERM)\n"
    )
    folder = run_folder(tmp_path, tracked(store, strategies={"s": {"class_path": "once.Once"}}))
    assert execute(folder).status == "KILLED"
    first = run_of(folder)
    assert execute(folder).status == "FINISHED"
    second = run_of(folder)
    assert first.info.run_id == second.info.run_id and second.info.status == "FINISHED"
    steps = [step for step, _ in history(store, second.info.run_id, "train/loss")]
    assert steps == sorted(set(steps)) and steps[-1] == 36


def test_of_a_stretch_of_equal_values_the_ends_are_recorded() -> None:
    translator, found = Translator(), []
    rates = [0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.3]
    entries = [{"kind": "metric", "t": n, "step": n, "values": {"train/learning_rate": rate, "train/loss": 2.0 - n}}
               for n, rate in enumerate(rates)]  # fmt: skip
    for entry in [*entries, {"kind": "status", "t": 7, "status": "KILLED", "reason": ""}]:
        found += translator.points(entry)
    assert [(value, step) for key, value, _, step in found if key == "train/learning_rate"] == [
        (0.1, 0), (0.1, 3), (0.2, 4), (0.3, 5), (0.3, 6)
    ]  # fmt: skip
    assert sum(key == "train/loss" for key, *_ in found) == len(rates)


def test_streams_of_more_than_fifty_tasks_record_aggregates_alone() -> None:
    from clplat.result_table import Cell

    cells = [
        Cell(view="default", metric="accuracy", task=f"t{k}", index=k, value=0.5, total=1.0, count=2.0,
             higher_is_better=True, headline=True)
        for k in range(51)
    ]  # fmt: skip
    translator = Translator()
    keys = []
    for row in (0, 1, 2):
        scored = [cell.__dict__ | {"value": 0.5 + 0.1 * row} for cell in cells]
        keys += [
            key for key, *_ in translator.points({"kind": "results", "row": row, "step": row, "t": 1, "cells": scored})
        ]
    assert keys and not any(key.startswith(("eval/", "forgetting_max/")) for key in keys)
    assert "cumulative_forgetting" in keys


def test_compare_report_results_and_reproduce_read_mlflow_alone(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = {
        "naive": {}, "er": {"strategies": {"replay": REPLAY}},
        "cumulative": {"strategies": {"data": {"class_path": "Cumulative"}}},
    }  # fmt: skip
    done = clplat.run(
        tracked(store, variants=variants, seeds=[0, 1], baseline="naive", launcher={"workers": 1}), quiet=True
    )
    expected = {name: table(done.folder / name) for name in ("er-s0", "er-s1")}
    run_id = json.loads((done.folder / "er-s1" / RUN_STATE).read_text())["run_id"]
    done.folder.rename(tmp_path / "moved-away")
    results = load_study_results("digits", store)
    assert results.variants() == ["naive", "er", "cumulative"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.compare_table(results))
    text = console.export_text()
    assert "cumulative †" in text and "note: unequal" not in text
    finals = [clplat.metrics.summary(expected[f"er-s{seed}"])["final_score"] for seed in (0, 1)]
    assert results.interval("er", "final_score").mean == pytest.approx(sum(finals) / 2)
    assert "direction" in report.finding(results)
    html = page.write_report(results, tmp_path / "out").read_text()
    drawn = {file.stem for file in (tmp_path / "out" / "figures").glob("*.svg")}
    assert drawn == {"paired", "ablation", "cost", "learned_and_lost", "forgetting", "heat_maps", "final_scores"}
    assert html.count("<svg") == len(drawn) and "http://" not in html.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert {file.stem for file in (tmp_path / "out" / "figures").glob("*.png")} == drawn
    frame = results_frame(results)
    assert set(frame["variant"]) == {"naive", "er", "cumulative"} and len(frame) == 6 * 4 * 3 * 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    from clplat.api import reproduce

    scores = reproduce(run_id, Console(quiet=True))
    same = scores["recorded"].equals(scores["now"])
    assert same


OPEN_TOGETHER = """
import sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store  # seconds, which differ from process to process
from clplat.mlflow_store import client
uri, ready = sys.argv[1], Path(sys.argv[2])
(ready / sys.argv[3]).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
client(uri).search_experiments()
"""


def test_two_processes_that_come_first_to_a_new_database_both_find_it_made(tmp_path: Path) -> None:
    ready, uri = tmp_path / "ready", f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    ready.mkdir()
    command = [sys.executable, "-c", OPEN_TOGETHER, uri, str(ready)]
    both = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("first", "second")]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert client(uri).search_experiments()
