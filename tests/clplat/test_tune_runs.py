"""Searches that train: what they see of the data, their record, and what is left of one that is killed."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import LR, TwoThatAsk, folder_here, go_on, quiet, tune, tune_study
from studies import assert_same

from clplat.errors import ConfigError
from clplat.journal import last_status, read, table
from clplat.launch import serve
from clplat.launchers.local import Local
from clplat.lease import holder
from clplat.mlflow_store import client
from clplat.mlflow_view import VIEW
from clplat.page import write_report
from clplat.report import notes
from clplat.run_note import NOTE
from clplat.streams.base import TensorData
from clplat.study_file import load_study, run_folders
from clplat.study_results import load_study_results
from clplat.tuning import search
from clplat.tuning import tune as tune_module


def test_nothing_of_the_tasks_beyond_the_first_ones_is_read_while_trials_run(monkeypatch) -> None:
    read_rows: dict[str, set[int]] = {}
    original, part = TensorData.batch, ["search"]

    def batch(self: TensorData, rows: Any) -> Any:
        read_rows.setdefault(part[0], set()).add(int(self.task[0]))
        return original(self, rows)

    def conclude(*arguments: Any) -> Any:
        part[0] = "report"
        return concluded(*arguments)

    concluded = tune_module._conclude_search
    monkeypatch.setattr(TensorData, "batch", batch)
    monkeypatch.setattr(tune_module, "_conclude_search", conclude)
    monkeypatch.setattr(tune_module, "prepare", _silently(tune_module.prepare, part))
    monkeypatch.setattr(tune_module, "conclude", lambda *_: None)
    tuned = tune(tune__trials=2)
    assert read_rows["search"] == {0, 1} and read_rows["report"] == {0, 1, 2}
    trial, reported = tuned.folder / "t0000-s1000", tuned.report.folder / "default-s0"
    digests = [{entry["name"]: entry["digest"] for entry in read(run) if entry["kind"] == "dataset"}
               for run in (trial, reported)]  # fmt: skip
    assert len(digests[0]) == 4 and len(digests[1]) == 6 and digests[0].items() < digests[1].items()
    assert table(trial).tasks() == table(reported).tasks()[:2]


def _silently(prepare: Any, part: list[str]) -> Any:
    """Checks before the search build the reported stream too, and let the model answer two of its rows."""

    def prepared(study: Any) -> Any:
        part[0] = "checks"
        found = prepare(study)
        part[0] = "search"
        return found

    return prepared


def test_mlflow_holds_the_search_its_trials_and_the_gain_and_tells_pruned_runs_from_failed_ones(
    store: str, monkeypatch
) -> None:
    monkeypatch.setattr(search, "worse_than_most", lambda *_, **__: True)
    tracking = {"enabled": True, "uri": store, "system_metrics": False}
    tuned = tune(tune={"trials": 2, "tasks": 3}, stream__init_args__num_tasks=6, tracking=tracking, seeds=[0])
    assert last_status(tuned.folder / "t0001-s1000") == "PRUNED"
    results = load_study_results(str(tuned.folder))
    assert {run.variant: run.status for run in results.runs} == {"t0000": "FINISHED", "t0001": "PRUNED"}
    assert results.missing() == [] and results.of("t0001") == []
    connection = client(store)
    parent = connection.get_run(json.loads((tuned.folder / "study.json").read_text())["run_id"])
    assert parent.info.status == "FINISHED" and parent.data.tags["on_test_sequence"] == "false"
    pruned = next(run for run in results.runs if run.status == "PRUNED")
    assert pruned.tags["pruned"] == "true" and "worse than the median" in pruned.tags["status_reason"]
    assert connection.get_run(pruned.run_id).info.status == "KILLED"
    files = {file.path for file in connection.list_artifacts(parent.info.run_id)}
    assert {"tune.yaml", "front.csv", "best.yaml", "tuning.html", "figures", "front"} <= files
    report = connection.get_run(json.loads((tuned.report.folder / "study.json").read_text())["run_id"])
    assert (
        report.data.tags["tune_run"] == parent.info.run_id and report.data.tags["tuned_on"] == "the first 3 of 6 tasks"
    )
    assert tuned.best.is_default and "the gain over them is 0" in tuned.text
    assert report.info.run_name == f"{tuned.folder.name}-{tuned.report.folder.name}"
    note, params = parent.data.tags[NOTE], parent.data.params
    assert "the gain over them is 0" in note and "2 trials: 1 finished, 1 pruned" in note
    for words in (f"runs/{report.info.run_id}", "path=tuning.html", "path=figures%2Ffront.png", "| t0000 (default) |"):
        assert words in note
    assert params["tune.sampler"] == "tpe" and json.loads(params[f"space.{LR}"])["high"] == 1.0
    view = connection.get_experiment(parent.info.experiment_id).tags[f"{VIEW}clplat.{tuned.folder.name}"]
    for column in ("tags.`pruned`", f"params.`{LR}`", "metrics.`final_score`"):
        assert column in json.loads(json.loads(view)["state"])["selectedColumns"]
    assert parent.data.tags["finding"] == tuned.text
    with pytest.raises(ConfigError, match=r"is a tune, and the scores of its trials are no result.*tuning.html"):
        write_report(results)
    assert not (tuned.folder / "report.html").exists() and not any("record" in note for note in notes(results))
    assert "pruned" in (tuned.folder / "tuning.html").read_text()


@pytest.mark.long
def test_the_best_settings_run_as_they_were_reported() -> None:
    import clplat

    tuned = tune(tune__trials=3, tune__prune=False, seeds=[0])
    name = "default" if tuned.best.is_default else "best"
    again = clplat.run(tuned.folder / "best.yaml", quiet=True)
    reported = table(tuned.report.folder / f"{name}-s0").to_rows()
    assert_same(table(again.folder / "digits_best-s0").to_rows(), reported)


@pytest.mark.long
def test_a_trial_is_an_ordinary_run_that_can_be_resumed_alone(monkeypatch) -> None:
    import clplat

    monkeypatch.setattr(tune_module, "conclude", lambda *_: None)
    monkeypatch.setattr(tune_module, "write_page", lambda *_: None)
    tuned = tune(tune__trials=2, seeds=[0])
    run = tuned.folder / "t0001-s1000"
    assert clplat.resume(run, console=quiet()).status == "FINISHED"
    assert [path.name for path in run_folders(tuned.folder)] == ["t0000-s1000", "t0001-s1000"]
    assert clplat.load_model(run) is not None


@pytest.mark.long
def test_a_run_in_a_worker_asks_at_its_boundaries_and_ends_where_it_is_told_to(tmp_path: Path) -> None:
    supply = TwoThatAsk(tmp_path)
    assert serve(supply, runs=2, launcher=Local(workers=2, threads=1), console=quiet()) == 0
    supply.assert_heard()
    assert table(tmp_path / "first").rows() == [0, 1, 2] and last_status(tmp_path / "first") == "PRUNED"


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "clplat", *words], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_tune_of_two_workers_that_is_killed_goes_on_and_loses_nothing(number: int, code: int) -> None:
    data = tune_study(training__budget={"steps": 60}, launcher={"workers": 2}, tune__trials=8, seeds=[0])
    Path("search.yaml").write_text(yaml.safe_dump(data))
    process = command("tune", "search.yaml")
    try:
        deadline = time.monotonic() + 200
        while not list(Path("runs").glob("*/t0003-s1000/checkpoints/*.pt")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, number)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == code, said
        folder = folder_here()
        finished = {run: (run / "journal.jsonl").read_bytes() for run in run_folders(folder)
                    if last_status(run) == "FINISHED"}  # fmt: skip
        assert finished and len(run_folders(folder)) < 8
        tuned = go_on(folder)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert {row.state for row in tuned.rows} <= {"FINISHED", "PRUNED"} and len(tuned.rows) == 8
    assert all((run / "journal.jsonl").read_bytes() == before for run, before in finished.items())
    assert tuned.status == "FINISHED" and "Traceback" not in said


@pytest.mark.long
def test_a_worker_that_is_killed_takes_no_trial_with_it() -> None:
    data = tune_study(training__budget={"steps": 60}, launcher={"workers": 2}, tune__trials=6, seeds=[0])
    Path("search.yaml").write_text(yaml.safe_dump(data))
    process = command("tune", "search.yaml")
    try:
        deadline = time.monotonic() + 200
        while not (found := list(Path("runs").glob("*/t0002-s1000/checkpoints/*.pt"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(holder(found[0].parent.parent).pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    with (folder_here() / "front.csv").open() as file:
        states = [row["status"] for row in csv.DictReader(file)]
    assert len(states) == 6 and set(states) <= {"FINISHED", "PRUNED"}, said


@pytest.mark.long
def test_the_shipped_search_on_digits_improves_its_poor_start_on_fresh_seeds_within_five_minutes() -> None:
    begun = time.monotonic()
    process = command("tune", "tune/split_digits", "--launcher.workers", "2", "--tracking.enabled", "false")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert time.monotonic() - begun < 300
    gain, half = map(float, re.search(r"final\s+score \+(\d\.\d+) ± (\d\.\d+)", said).groups())
    assert gain > half > 0
    assert load_study(folder_here() / "best.yaml").seeds == [0, 1, 2, 3, 4]
