"""A resumed study is the one that was begun: its plan, its data, and all of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import yaml
from records import Made
from studies import REPLAY, study

import clplat
from clplat.api import resume
from clplat.errors import ConfigError
from clplat.journal import last_status, table
from clplat.plan import NAME
from clplat.study import lay_out, lay_out_runs, preflight
from clplat.study_file import expand, load_study
from clplat.study_results import load_study_results

ARMS = {"naive": {}, "er": {"strategies": {"replay": REPLAY}}}


def begun(**changes: Any) -> Path:
    """A study that was laid out and of which nothing ran yet."""
    config = load_study(study(variants=ARMS, seeds=[0, 1], **changes))
    runs = expand(config)
    return lay_out(config, runs, preflight(runs))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 12", "steps: 13", r"begun with \(training\.budget\.steps: 12 → 13\); undo the change"),
        ("capacity: 40", "capacity: 41", r"strategies\.replay\.init_args\.capacity: 40 → 41 \(er\)"),
        ("seeds:\n- 0\n- 1", "seeds:\n- 0\n- 7", r"seeds: \[0, 1\] → \[0, 7\]"),
        ("  er:\n", "  er2:\n", r"variants: \['naive', 'er'\] → \['naive', 'er2'\]"),
    ],
)
def test_an_edited_study_is_refused_with_what_differs_and_is_left_as_it_is(old: str, new: str, message: str) -> None:
    folder = begun()
    file = folder / "study.yaml"
    assert old in file.read_text()
    edited = file.read_text().replace(old, new)
    file.write_text(edited)
    with pytest.raises(ConfigError, match=message):
        resume(folder)
    with pytest.raises(ConfigError, match=message):
        resume(folder / "naive-s0")
    assert file.read_text() == edited and last_status(folder / "naive-s0") == "WAITING"


def test_keys_on_which_results_do_not_depend_may_be_edited() -> None:
    folder = begun(launcher={"workers": 1})
    file = folder / "study.yaml"
    file.write_text(file.read_text().replace("every_seconds: 0", "every_seconds: 5"))
    assert resume(folder).code == 0


def without_option(folder: Path, option: str) -> None:
    """The study as an earlier version wrote it, whose replay had not got this option."""
    plan = json.loads((folder / NAME).read_text())
    del plan["variants"]["er"]["strategies"]["replay"]["init_args"][option]
    (folder / NAME).write_text(json.dumps(plan))
    for run in folder.glob("er-s*/config.yaml"):
        config = yaml.safe_load(run.read_text())
        del config["strategies"]["replay"]["init_args"][option]
        run.write_text(yaml.safe_dump(config))


def test_a_study_begun_before_an_option_existed_goes_on_with_its_default_and_with_no_other_value() -> None:
    folder = begun(launcher={"workers": 1})
    without_option(folder, "mean")
    file = folder / "study.yaml"
    given = file.read_text()
    file.write_text(given.replace("capacity: 40", "capacity: 40\n          mean: all"))
    with pytest.raises(ConfigError, match=r"strategies\.replay\.init_args\.mean: each → all \(er\)\); undo the change"):
        resume(folder)
    file.write_text(given)
    assert resume(folder).code == 0 and last_status(folder / "er-s1") == "FINISHED"


def test_run_folders_that_are_gone_are_named_and_run_anew_with_the_same_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = clplat.run(study(variants=ARMS, launcher={"workers": 1}), quiet=True)
    before = table(done.folder / "er-s0").to_rows()
    rmtree(done.folder / "er-s0")
    again = resume(done.folder)
    assert "er-s0: its folder is gone; it is run anew" in capsys.readouterr().out
    assert [outcome.folder.name for outcome in again.outcomes] == ["er-s0"] and again.code == 0
    assert str(table(done.folder / "er-s0").to_rows()) == str(before)


def test_a_run_that_was_run_anew_counts_once_in_mlflow(store: str) -> None:
    made = Made(store, ["naive"], [0])
    made.run("naive", 0, [[0.5, 0.5], [0.9, 0.5], [0.1, 0.9]])
    rmtree(made.folder / "naive-s0")
    lay_out_runs(made.folder, [made.configs["naive", 0]])
    made.run("naive", 0, [[0.5, 0.5], [0.9, 0.5], [0.3, 0.9]])
    results = load_study_results("digits", store)
    assert len(results.of("naive")) == 1
    assert results.interval("naive", "final_score").mean == pytest.approx(0.6)


BLOBS = """
import torch
from pathlib import Path
from clplat.streams.base import EvalSet, Spec, Stream, Task, TensorData
from clplat.streams.scorers import Classify
class Blobs(Stream):
    def prepare(self):
        shift, *names = Path("blobs.txt").read_text().split()
        self.spec, self.tasks = Spec(kind="classify", input_shape=(2,), num_outputs=2, scenario="domain"), []
        for index, name in enumerate(names):
            points, labels = torch.arange(80.0).view(40, 2) + float(shift), torch.arange(40) % 2
            data = TensorData(points, labels, task=index)
            scored = EvalSet(name=name, data=data, scorer=Classify())
            made = Task(index=index, name=name, train=data, test=scored, classes=(0, 1), headline="accuracy")
            self.tasks.append(made)
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [("1 a b", "the data of a, b changed since the study was begun"), ("0 b a", r"tasks are not .*\(a, b → b, a\)")],
)
def test_a_study_does_not_go_on_with_other_data_or_another_order_of_tasks(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "blobs.py").write_text(BLOBS)
    (tmp_path / "blobs.txt").write_text("0 a b")
    folder = begun(stream={"class_path": "blobs.Blobs"}, launcher={"workers": 1})
    (tmp_path / "blobs.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        resume(folder)
    (tmp_path / "blobs.txt").write_text("0 a b")
    assert resume(folder).code == 0


def test_a_run_alone_is_not_taken_up_on_other_data(tmp_path: Path) -> None:
    (tmp_path / "blobs.py").write_text(BLOBS)
    (tmp_path / "blobs.txt").write_text("0 a b")
    folder = begun(stream={"class_path": "blobs.Blobs"}, launcher={"workers": 1})
    assert resume(folder).code == 0
    (folder / "planned.json").unlink()
    with (folder / "er-s1" / "journal.jsonl").open("a") as file:
        file.write('{"t": 0, "kind": "status", "status": "KILLED", "reason": ""}\n')
    (tmp_path / "blobs.txt").write_text("1 a b")
    outcome = resume(folder).outcomes[0]
    assert outcome.status == "FAILED" and "the train data of a changed since the run was begun" in outcome.reason


def test_a_run_that_lost_its_journal_is_refused_and_one_that_lost_its_folder_leads_to_its_study() -> None:
    folder = clplat.run(study(), quiet=True).folder
    (folder / "digits-s0" / "journal.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"digits-s0: its journal\.jsonl is gone.*remove the folder"):
        resume(folder)
    rmtree(folder / "digits-s0")
    with pytest.raises(ConfigError, match=r"digits-s0: there is no such run folder; `clplat resume .*` makes one"):
        resume(folder / "digits-s0")
    assert resume(folder).code == 0 and last_status(folder / "digits-s0") == "FINISHED"


def test_a_run_that_lost_its_configuration_gets_it_back_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun(launcher={"workers": 1})
    assert resume(folder / "er-s0").code == 0
    before = (folder / "er-s0" / "config.yaml").read_text()
    (folder / "er-s0" / "config.yaml").unlink()
    assert resume(folder).code == 0
    assert "er-s0: its config.yaml is gone; it is written again" in capsys.readouterr().out
    assert (folder / "er-s0" / "config.yaml").read_text() == before


def test_a_damaged_plan_is_named_and_a_study_without_one_resumes() -> None:
    folder = begun(launcher={"workers": 1})
    (folder / "planned.json").write_text("{")
    with pytest.raises(ConfigError, match=r"planned\.json: is damaged .*delete it"):
        resume(folder)
    (folder / "planned.json").unlink()
    assert resume(folder).code == 0


def test_a_folder_that_is_no_study_is_not_sent_anywhere() -> None:
    Path("runs").mkdir()
    with pytest.raises(ConfigError, match="runs: is no study folder"):
        load_study_results("runs")
