"""The feed alone, without training: no failure of a server or a name makes it lose or repeat anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from records import Made, cells

from clplat.config import TrackingConfig
from clplat.journal import Journal, record_lost
from clplat.lease import held
from clplat.mlflow_store import client
from clplat.record import write_artifacts
from clplat.study_record import finish_study, send_unsent, start_study, sync
from clplat.tracking import RUN_STATE, STUDY_STATE, Feed


def journal_of(study: Made, variant: str = "naive", seed: int = 0) -> Journal:
    return Journal(study.folder / f"{variant}-s{seed}")


def feed_of(journal: Journal, uri: str) -> Feed:
    return Feed(journal.folder, TrackingConfig(uri=uri, system_metrics=False))


def mlflow_run(journal: Journal, uri: str) -> Any:
    return client(uri).get_run(json.loads((journal.folder / RUN_STATE).read_text())["run_id"])


REQUESTS = ("create_run", "log_inputs", "log_batch", "log_artifacts", "set_terminated")


@pytest.mark.parametrize("failing", range(len(REQUESTS)))
def test_whichever_request_fails_the_next_attempt_sends_everything(
    failing: int, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    journal.metrics(1, {"a": 0.5})
    journal.tags({"stream": "s"})
    journal.metrics(2, {"a": 0.25})
    journal.params({"x.y": 1})
    journal.dataset("d", "0123", "train")
    journal.results(0, 0, cells([0.1, 0.2], ["a", "b"]))
    journal.status("KILLED", "because")
    journal.flush()
    write_artifacts(journal.folder)
    calls = 0

    def shaky(name: str) -> Any:
        original = getattr(mlflow.MlflowClient, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise ConnectionError("gone")
            return original(self, *args, **kwargs)

        return call

    for name in REQUESTS:
        monkeypatch.setattr(mlflow.MlflowClient, name, shaky(name))
    feed = feed_of(journal, store)
    assert not feed.finish("KILLED") and feed.finish("KILLED")
    run = mlflow_run(journal, store)
    assert run.data.tags["stream"] == "s" and run.data.tags["status_reason"] == "because"
    assert run.data.params == {"x.y": "1"}
    assert [point.value for point in client(store).get_metric_history(run.info.run_id, "a")] == [0.5, 0.25]
    assert run.data.metrics["eval/b/accuracy"] == 0.2
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == ["0123"]
    assert run.info.status == "KILLED"


def test_a_run_costs_its_store_one_request_of_each_kind_and_one_more_each_time_it_is_sent_meanwhile(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    asked: list[str] = []

    def noted(name: str) -> Any:
        original = getattr(mlflow.MlflowClient, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in [name for name in vars(mlflow.MlflowClient) if not name.startswith("_")]:
        if callable(getattr(mlflow.MlflowClient, name)):
            monkeypatch.setattr(mlflow.MlflowClient, name, noted(name))
    feed = feed_of(journal, store)
    journal.params({"x.y": 1})
    for task in ("a", "b"):
        journal.tags({f"stream.{task}": "s"})
        journal.dataset(task, "0123", "train")
    for step in range(3):
        journal.metrics(step, {f"m{number}": 0.5 for number in range(100)})
        journal.flush()
        feed._send_new()
    journal.results(0, 3, cells([0.1, 0.2], ["a", "b"]))
    journal.status("FINISHED")
    journal.flush()
    write_artifacts(journal.folder)
    assert feed.finish("FINISHED")
    assert asked == [*REQUESTS[:3], "log_batch", "log_batch", "log_batch", *REQUESTS[3:]]
    assert len(mlflow_run(journal, store).data.metrics) > 100


def test_samples_of_the_machine_go_with_what_is_sent_and_wait_where_that_fails(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    journal.status("RUNNING")
    journal.flush()
    feed = Feed(journal.folder, TrackingConfig(uri=store))
    feed._send_new()
    feed._start_monitor()
    feed._samples += feed._sample()
    original, sizes = mlflow.MlflowClient.log_batch, []

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    def noted(self: Any, run_id: str, metrics: Any, *args: Any) -> None:
        sizes.append(len(metrics))
        original(self, run_id, metrics, *args)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", away)
    assert not feed.finish("FINISHED")
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", noted)
    journal.metrics(1, {"a": 0.5})
    journal.flush()
    assert feed.finish("FINISHED") and not feed._samples
    metrics = mlflow_run(journal, store).data.metrics
    system = {key for key in metrics if key.startswith("system/")}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= system
    assert metrics["system/system_memory_usage_megabytes"] > 0 and sizes == [len(system) + 1]


def test_a_run_whose_files_could_not_be_sent_is_sent_again_at_the_studys_end(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    journal.results(0, 0, cells([0.1, 0.2], ["a", "b"]))
    journal.status("FINISHED")
    journal.flush()
    write_artifacts(journal.folder)

    def away(*_: Any) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifacts", away)
        assert not feed_of(journal, store).finish("FINISHED")
        assert "gone" in send_unsent([journal.folder])
    run = mlflow_run(journal, store)
    assert run.info.status == "RUNNING"
    assert send_unsent([journal.folder]) == ""
    run = mlflow_run(journal, store)
    names = {file.path for file in client(store).list_artifacts(run.info.run_id)}
    assert run.info.status == "FINISHED"
    assert names == {"config.yaml", "environment.txt", "results.csv", "heatmap.svg", "scores.svg"}


def test_names_that_mlflow_refuses_are_changed_and_block_nothing(store: str) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    names = ["../x", "a//b", "c/", "what?", "C4 → Wiki", "ü", "", "n" * 300]
    journal.results(0, 0, cells([0.5] * len(names), names))
    journal.params({f"init_args.{name}": 1 for name in names})
    journal.tags({f"stream.{name}": "1" for name in names})
    journal.flush()
    assert feed_of(journal, store).finish("FINISHED")
    run = mlflow_run(journal, store)
    assert len([key for key in run.data.metrics if key.startswith("eval/")]) == len(names)
    assert "eval/what_/accuracy" in run.data.metrics and "init_args.what_" in run.data.params


def test_settings_that_a_resumed_run_may_change_become_tags(store: str) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    journal.params({"training.devices": 1, "seed": 0})
    journal.flush()
    assert feed_of(journal, store).finish("KILLED")
    journal.params({"training.devices": 2, "seed": 0, "training.workers": 3})
    journal.metrics(7, {"a": 1.0})
    journal.flush()
    assert feed_of(journal, store).finish("FINISHED")
    run = mlflow_run(journal, store)
    assert run.data.params == {"training.devices": "1", "seed": "0", "training.workers": "3"}
    assert run.data.tags["resumed.training.devices"] == "2" and run.data.metrics["a"] == 1.0


def test_another_server_gets_the_whole_record_under_the_study_there(
    store: str, empty_store: bytes, tmp_path: Path
) -> None:
    study = Made(store, ["naive"], [0])
    study.run("naive", 0, [[0.1, 0.1], [0.9, 0.1], [0.5, 0.8]])
    (tmp_path / "other.db").write_bytes(empty_store)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert sync(study.folder, other) == 1
    journal = journal_of(study)
    run = mlflow_run(journal, other)
    assert run.data.tags["mlflow.parentRunId"] == json.loads((study.folder / STUDY_STATE).read_text())["run_id"]
    assert run.data.metrics["final_forgetting"] == pytest.approx(0.4)
    assert len(client(other).get_metric_history(run.info.run_id, "eval/a/accuracy")) == 3


def test_a_run_is_found_under_its_study_when_the_server_came_back_after_it_started(store: str) -> None:
    study = Made("http://127.0.0.1:9", ["naive"], [0])
    assert not (study.folder / STUDY_STATE).exists()
    config = study.folder / "study.yaml"
    config.write_text(config.read_text().replace("http://127.0.0.1:9", store))
    journal = journal_of(study)
    journal.status("RUNNING")
    journal.flush()
    feed = feed_of(journal, store)
    assert feed.finish("FINISHED")
    assert "mlflow.parentRunId" not in mlflow_run(journal, store).data.tags
    start_study(study.folder)
    assert feed_of(journal, store).finish("FINISHED")
    parent = json.loads((study.folder / STUDY_STATE).read_text())["run_id"]
    assert mlflow_run(journal, store).data.tags["mlflow.parentRunId"] == parent


def test_sync_leaves_a_run_that_is_under_way_alone(store: str) -> None:
    study = Made(store, ["naive", "er"], [0])
    study.run("er", 0, [[0.1, 0.1], [0.9, 0.1]])
    journal = journal_of(study)
    journal.status("RUNNING")
    journal.flush()
    start_study(study.folder)
    with held(journal.folder):
        assert sync(study.folder) == 1
        assert not (journal.folder / RUN_STATE).exists()
        parent = json.loads((study.folder / STUDY_STATE).read_text())["run_id"]
        assert client(store).get_run(parent).info.status == "RUNNING"
    assert sync(study.folder) == 2
    assert mlflow_run(journal, store).info.status == "KILLED"
    assert client(store).get_run(parent).info.status == "KILLED"


def test_a_run_that_was_killed_outright_gets_its_files_with_sync(store: str) -> None:
    study = Made(store, ["naive"], [0])
    journal = journal_of(study)
    journal.status("RUNNING")
    journal.results(0, 0, cells([0.1, 0.2], ["a", "b"]))
    journal.flush()
    sync(study.folder)
    run = mlflow_run(journal, store)
    assert {"config.yaml", "results.csv"} <= {file.path for file in client(store).list_artifacts(run.info.run_id)}


def test_what_a_removed_database_had_is_sent_again_by_sync(store: str) -> None:
    def said(command: str) -> str:
        # In a process of its own: this one has the removed file open.
        line = [sys.executable, "-P", "-m", "clplat", command, str(study.folder)]
        done = subprocess.run(line, capture_output=True, text=True)
        return done.stdout + done.stderr

    study = Made(store, ["naive"], [0])
    study.run("naive", 0, [[0.1, 0.1], [0.9, 0.1], [0.3, 0.8]])
    assert "0.550" in said("compare")
    Path(store.removeprefix("sqlite:///")).unlink()
    assert "there is no database" in said("compare")
    assert "MLflow has all of 1 run" in said("sync")
    assert "0.550" in said("compare")


def test_a_run_whose_process_died_is_not_left_running(store: str) -> None:
    study = Made(store, ["naive", "er"], [0])
    journal = journal_of(study)
    journal.status("RUNNING")
    journal.flush()
    feed = feed_of(journal, store)
    feed._send_new()
    assert mlflow_run(journal, store).info.status == "RUNNING"
    record_lost(journal.folder, "FAILED", "its process died")
    send_unsent([journal.folder, study.folder / "er-s0"])
    run = mlflow_run(journal, store)
    assert run.info.status == "FAILED" and run.data.tags["status_reason"] == "its process died"
    assert not (study.folder / "er-s0" / RUN_STATE).exists()


def test_looking_up_versions_is_safe_while_mlflow_is_imported_in_the_background(store: str) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    code = (
        "import sys; from importlib.metadata import version; from pathlib import Path\n"
        "from clplat.config import TrackingConfig; from clplat.tracking import Feed\n"
        "folder, uri = Path(sys.argv[1]), sys.argv[2]\n"
        "feed = Feed(folder, TrackingConfig(uri=uri, system_metrics=False))\n"
        "feed.start()\n"
        "assert 'importlib_metadata' in sys.modules and 'mlflow' not in sys.modules\n"
        "assert hasattr(sys.modules['importlib_metadata'], 'PathDistribution')\n"
        "feed._closing.set()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(journal.folder), store], check=True)


def test_a_record_sent_later_keeps_the_times_of_the_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_of(Made(store, ["naive"], [0]))
    for second, status in ((1000, "RUNNING"), (1060, "FINISHED")):
        with monkeypatch.context() as patch:
            patch.setattr("time.time", lambda second=second: second)
            journal.status(status)
    journal.flush()
    assert feed_of(journal, store).finish("FINISHED")
    info = mlflow_run(journal, store).info
    assert (info.start_time, info.end_time) == (1_000_000, 1_060_000)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["FINISHED", "FINISHED"], "FINISHED"), (["FINISHED", "FAILED"], "FAILED"), (["FINISHED", "WAITING"], "KILLED"),
        (["FAILED", "KILLED"], "KILLED"), (["RUNNING"], "KILLED"),
    ],
)  # fmt: skip
def test_a_study_is_finished_when_all_its_runs_are(statuses: list[str], expected: str, store: str) -> None:
    study = Made(store, ["naive"], [0])
    finish_study(study.folder, statuses)
    parent = json.loads((study.folder / STUDY_STATE).read_text())["run_id"]
    assert client(store).get_run(parent).info.status == expected


def test_a_relative_database_means_the_same_from_any_folder(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Made("sqlite:///mlflow.db", ["naive"], [0])
    assert study.configs["naive", 0].tracking.uri == "sqlite:///mlflow.db"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    journal = Journal(tmp_path / study.folder / "naive-s0")
    journal.status("RUNNING")
    journal.flush()
    assert sync(journal.folder) == 1
    assert mlflow_run(journal, store).info.status == "KILLED"
    assert not (tmp_path / "elsewhere" / "mlflow.db").exists()
