"""What MLflow shows of studies and runs: descriptions with tables and pictures, views, colours, data sets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from records import Made

from clplat.errors import ConfigError
from clplat.mlflow_store import client
from clplat.mlflow_view import KEPT, VIEW, add_view, page_of_study
from clplat.page import write_report
from clplat.run_note import LONGEST, NOTE, escaped, fitted, markdown_table
from clplat.storage import read_json
from clplat.study_record import start_study
from clplat.study_results import load_study_results
from clplat.tracking import RUN_STATE, STUDY_STATE


def test_a_run_is_described_by_its_scores_table_and_pictures_and_found_in_its_study(store: str) -> None:
    study = Made(store, ["naive", "er"], [0])
    study.run("er", 0, [[0.1, 0.1], [0.9, 0.1], [0.5, 0.8]], tasks=["a|b", "c"])
    state = read_json(study.folder / "er-s0" / RUN_STATE)
    assert state is not None
    tags = client(store).get_run(state["run_id"]).data.tags
    note = tags[NOTE]
    assert "| after c | 0.500 | 0.800 |" in note and "a\\|b" in note
    assert f"![heatmap](get-artifact?path=heatmap.svg&run_uuid={state['run_id']})" in note
    assert tags["study_run"] == study.folder.name and tags["kind"] == "run"
    # The second variant's colour in the report.
    assert tags["mlflow.runColor"] == "#D55E00"


def test_a_failed_run_says_why_in_its_description(store: str) -> None:
    study = Made(store, ["naive"], [0])
    study.run("naive", 0, [[0.1, 0.1]], status="FAILED", reason="no <idea>")
    state = read_json(study.folder / "naive-s0" / RUN_STATE)
    assert state is not None
    assert "**FAILED** no \\<idea\\>" in client(store).get_run(state["run_id"]).data.tags[NOTE]


def test_a_study_is_described_by_finding_table_and_report(store: str, tmp_path: Path) -> None:
    study = Made(store, ["naive", "er"], [0, 1], baseline="naive")
    for seed in (0, 1):
        study.run("naive", seed, [[0.1, 0.1], [0.9, 0.1], [0.3, 0.8]])
        study.run("er", seed, [[0.1, 0.1], [0.9, 0.1], [0.8, 0.7]])
    write_report(load_study_results("digits", store), tmp_path / "out")
    state = read_json(study.folder / STUDY_STATE)
    assert state is not None
    tags = client(store).get_run(state["run_id"]).data.tags
    assert tags["finding"].startswith("Best final score: er, 0.750") and tags["finding"][:20] in tags[NOTE]
    assert "| er | 2 | 0.750" in tags[NOTE]
    # The page becomes as wide as its widest picture, beside which text would run out of the window.
    pictures = re.findall(r"!\[[^]]*\]\(get-artifact\?path=([^&]+)&", tags[NOTE])
    assert len(pictures) == 2
    for name in pictures:
        with Image.open(tmp_path / "out" / unquote(name)) as picture:
            assert picture.width <= 850
    assert f"[Open the report](get-artifact?path=report.html&run_uuid={state['run_id']})" in tags[NOTE]


def test_a_study_has_a_view_and_only_the_newest_of_ours_are_kept(store: str) -> None:
    study = Made(store, ["naive"], [0])
    connection = client(store)
    connection.set_experiment_tag("1", f"{VIEW}mine", "{}")
    key = f"{VIEW}clplat.{study.folder.name}"
    view = json.loads(connection.get_experiment("1").tags[key])
    assert study.folder.name in json.loads(view["state"])["searchFilter"]
    columns = json.loads(view["state"])["selectedColumns"]
    # MLflow's order is that of the names; about three fit into a window, and scores must be among them.
    metrics = sorted(column for column in columns if column.startswith("metrics."))
    assert metrics == [f"metrics.`{name}`" for name in ("final_forgetting", "final_score", "learning_score")]
    assert page_of_study("1", study.folder.name).endswith(f"viewStateShareKey=clplat.{study.folder.name}")
    for number in range(KEPT):
        add_view(connection, "1", f"later-{number}", view["createdAt"] + 1 + number)
    tags = connection.get_experiment("1").tags
    assert key not in tags and f"{VIEW}mine" in tags and f"{VIEW}clplat.later-0" in tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_note_is_never_longer_than_mlflow_takes_and_shows_text_as_it_is() -> None:
    assert fitted(["a", "x" * LONGEST, "b"]) == "a\n\nb"
    assert escaped("a*b_[c]") == "a\\*b\\_\\[c\\]"
    assert markdown_table(["", "x"], [["r", "1"]]).splitlines()[1] == "| :--- | ---: |"


def test_reports_of_two_tunes_that_found_the_same_trial_best_are_told_apart(store: str) -> None:
    names = []
    for tune in ("one", "two"):
        study = Made(store, ["default"], [0])
        place = study.folder.parent / tune / "report-t0001"
        place.parent.mkdir()
        (place.parent / "tune.yaml").touch()
        study.folder = study.folder.rename(place)
        (place / STUDY_STATE).unlink()
        start_study(place)
        study.run("default", 0, [[0.1, 0.1], [0.9, 0.1], [0.3, 0.8]])
        names.append(f"{tune}-report-t0001")
        found = load_study_results(names[-1], store)
        assert found.folder == str(place.resolve()) and found.runs[0].tags["study_run"] == names[-1]
        assert f"{VIEW}clplat.{names[-1]}" in client(store).get_experiment("1").tags
    client(store).set_tag(found.run_id, "mlflow.runName", names[0])
    with pytest.raises(ConfigError, match=r"has 2 of this name; give a run id: \w+ \(.*two/report-t0001\)"):
        load_study_results(names[0], store)
