"""Whatever is wrong is said in one paragraph that names the field and the fix, before or without losing work."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from records import Made
from studies import REPLAY, run_folder, study

import clplat
from clplat.api import resume
from clplat.checkpoint import Checkpoints
from clplat.errors import ConfigError, StorageError
from clplat.execution import execute
from clplat.journal import last_status, read
from clplat.learner import Learner
from clplat.page import write_report
from clplat.streams.base import Budget
from clplat.study import lay_out, preflight
from clplat.study_file import expand, load_study
from clplat.study_results import load_study_results


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategies": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 10**6}}}},
            r"^strategies\.replay: .*capacity.*1000000",
        ),
        (
            {"stream": {"class_path": "StdlibText"}},
            r"^architecture: MLP is not causal.*Transformer",
        ),
        (
            {"training__compile": "reduce-overhead", "training__accumulate": 2},
            r"^training\.compile: reduce-overhead needs accumulate 1",
        ),
        (
            {"training__accelerator": "gpu"} if not torch.cuda.is_available() else {"training__devices": 99},
            r"training\.(accelerator|devices)",
        ),
    ],
)
def test_what_only_model_and_data_together_show_is_refused_before_training(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(expand(load_study(study(**changes))))


def test_nothing_is_written_when_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        clplat.run(study(strategies={"replay": REPLAY | {"init_args": {"capacity": 10**6}}}), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_a_number_fails_the_run_and_never_overwrites_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path, study())
    original = Learner._loss

    def poisoned(self: Learner, *args: Any) -> torch.Tensor:
        loss = original(self, *args)
        if self.global_steps == 15:
            self.window["loss"][-1] = loss.detach() * float("nan")
            return loss * float("nan")
        return loss

    monkeypatch.setattr(Learner, "_loss", poisoned)
    outcome = execute(folder)
    assert outcome.status == last_status(folder) == "FAILED"
    assert "step" in outcome.reason and "lower training.optimizer.init_args.lr" in outcome.reason
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None and state["global_steps"] == 15
    assert all(bool(torch.isfinite(value).all()) for value in state["architecture"].values())


def test_a_full_disk_fails_the_run_by_name_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path, study())
    original, count = torch.save, 0

    def full(state: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count > 5:
            file.write(b"x" * 100)
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", full)
    outcome = execute(folder)
    assert outcome.status == "FAILED" and "No space left" in outcome.reason and "clplat resume" in outcome.reason
    assert not list((folder / "checkpoints").glob("*.part"))
    monkeypatch.undo()
    assert execute(folder).status == "FINISHED"


def test_a_checkpoint_that_cannot_be_written_raises_a_storage_error_that_names_the_folder(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_seconds=0)
    checkpoints.folder.rmdir()
    with pytest.raises(StorageError, match="checkpoints"):
        checkpoints.save({}, "train")


def test_a_failing_component_fails_its_run_alone_and_leaves_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from clplat.strategies.base import Strategy\n"
        "class Broken(Strategy):\n"
        "    def task_end(self, task):\n"
        "        raise RuntimeError('no idea')\n"
    )
    data = study(variants={"naive": {}, "broken": {"strategies": {"b": {"class_path": "mine.Broken"}}}})
    done = clplat.run(data, quiet=True)
    assert [outcome.status for outcome in done.outcomes] == ["FINISHED", "FAILED"]
    assert done.code == 1 and done.status == "FAILED"
    assert "RuntimeError: no idea" in done.outcomes[1].reason
    assert "task_end" in (done.folder / "broken-s0" / "error.txt").read_text()


def test_a_penalty_that_is_too_strong_is_named_when_the_loss_diverges(tmp_path: Path) -> None:
    strong = {"hold": {"class_path": "OnlineEWC", "init_args": {"strength": 1e30}}}
    outcome = execute(run_folder(tmp_path, study(strategies=strong)))
    assert (
        outcome.status == "FAILED" and "lower the strength of strategies.hold or training.optimizer" in outcome.reason
    )


def test_a_changed_scientific_key_on_resume_is_refused_with_the_difference_and_a_free_one_is_not(
    tmp_path: Path,
) -> None:
    done = clplat.run(study(), quiet=True)
    folder = done.folder / "digits-s0"
    with pytest.raises(ConfigError, match=r"training\.batch_size: 16 → 8"):
        resume(folder, [("training.batch_size", "8")])
    with pytest.raises(ConfigError, match=r"stream\.init_args\.num_tasks"):
        resume(folder, [("stream.init_args.num_tasks", "2")])
    resume(folder, [("training.workers", "2"), ("tracking.uri", "sqlite:///elsewhere.db")])
    with pytest.raises(ConfigError, match="--seeds: a resumed study keeps its runs"):
        resume(done.folder, [("seeds", "[1]")])
    resume(done.folder, [("launcher.workers", "1")])


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("name: a\nvariants:\n  er: {seeds: 1}\n  er: {seeds: 2}\n")
    with pytest.raises(ConfigError, match="er: this key stands twice"):
        load_study(tmp_path / "twice.yaml")


def test_a_run_that_was_edited_before_it_had_a_checkpoint_is_refused_and_keeps_its_status(tmp_path: Path) -> None:
    config = load_study(study(seeds=[0, 1]))
    folder = lay_out(config, expand(config))
    file = folder / "digits-s1" / "config.yaml"
    file.write_text(file.read_text().replace("batch_size: 16", "batch_size: 8"))
    for target in (folder, file.parent):
        with pytest.raises(
            ConfigError, match=r"digits-s1.config.yaml: is not what study.yaml says .*batch_size: 16 → 8"
        ):
            resume(target)
    assert last_status(file.parent) == "WAITING"


def test_a_model_that_cannot_read_the_stream_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text(
        "from torch import nn\n"
        "from clplat.architectures.base import Architecture, Output\n"
        "class Narrow(Architecture):\n"
        "    def __init__(self, *, spec):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(1, spec.num_outputs)\n"
        "    def forward(self, batch, state=None, return_hidden=None):\n"
        "        return Output(logits=self.layer(batch.inputs))\n"
    )
    with pytest.raises(ConfigError, match=r"^architecture: Narrow cannot answer rows \(2, 1, 8, 8\)"):
        clplat.run(study(architecture={"class_path": "narrow.Narrow"}), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    run = expand(load_study(study(strategies={"r": REPLAY | {"init_args": {"capacity_bytes": 1e4}}})))[0]
    assert run.strategies["r"].init_args["capacity_bytes"] == 10_000


def test_naming_one_unit_of_a_budget_replaces_the_other() -> None:
    assert load_study(study(), [("training.budget.epochs", "2")]).training.budget == Budget(epochs=2)
    variant = expand(load_study(study(variants={"long": {"training": {"budget": {"epochs": 3}}}})))[0]
    assert variant.training.budget == Budget(epochs=3)


def test_a_configuration_edited_behind_the_back_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, study())
    assert execute(folder).status == "FINISHED"
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("batch_size: 16", "batch_size: 8"))
    outcome = execute(folder)
    assert outcome.status == "FAILED" and "training.batch_size: 16 → 8" in outcome.reason


def test_a_task_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "holes.py").write_text(
        "import torch\n"
        "from clplat.streams.base import EvalSet, Spec, Stream, Task, TensorData\n"
        "from clplat.streams.scorers import Classify\n"
        "class Holes(Stream):\n"
        "    def prepare(self):\n"
        "        self.spec = Spec(kind='classify', input_shape=(4,), num_outputs=2)\n"
        "        data = [TensorData(torch.randn(n, 4), torch.zeros(n, dtype=torch.long), task=0) for n in (0, 5)]\n"
        "        test = EvalSet(name='t', data=data[1], scorer=Classify())\n"
        "        self.tasks = [Task(index=0, name='empty one', train=data[0], test=test, headline='accuracy')]\n"
    )
    with pytest.raises(ConfigError, match="task 'empty one' has no training rows"):
        preflight(expand(load_study(study(stream={"class_path": "holes.Holes"}))))


def test_the_journal_of_a_failed_run_is_standard_json_and_ends_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path, study())

    def broken(self: Learner, *args: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(Learner, "training_step", broken)
    execute(folder)
    for line in (folder / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not standard JSON"))
    assert [entry["status"] for entry in read(folder) if entry["kind"] == "status"] == ["RUNNING", "FAILED"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__workers": -2}, r"training\.workers: must be at least 0, got -2"),
        ({"training__warmup": 7}, r"training\.warmup: .*at most 1"),
        ({"launcher": {"workers": -3}}, r"launcher\.workers: must be at least 1"),
        ({"name": "../evil"}, r"name: use up to 100 letters"),
        (
            {"training__optimizer": {"class_path": "SGD", "init_args": {"lr": -1}}},
            r"optimizer.*learning rate",
        ),
    ],
)
def test_values_out_of_range_are_refused_by_name_before_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(expand(load_study(study(**changes))))


def test_a_file_that_is_not_text_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match=r"study\.yaml: is not UTF-8 text"):
        load_study("study.yaml")


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "x.txt").write_text("some words\n" * 100)
    domain = {"name": "a", "path": "text", "data_files": {"train": "x.txt"}}
    text = {"class_path": "TextStream", "init_args": {"domains": [domain]}}
    with pytest.raises(ConfigError, match=r"cache folder .*cache cannot be made .*CLPLAT_CACHE"):
        preflight(expand(load_study(study(stream=text))))


def test_a_report_that_cannot_be_written_is_refused_by_name(tmp_path: Path, store: str) -> None:
    made = Made(store, ["naive"], [0])
    made.run("naive", 0, [[0.5, 0.5], [0.9, 0.5], [0.1, 0.9]])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="out: file cannot be made"):
        write_report(load_study_results("digits", store), "file")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"folder: .*file.* \(Not a directory\); name one that can be written$"):
        clplat.run(study(folder=str(tmp_path / "file")), quiet=True)


def test_space_is_named_where_space_is_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("clplat.study.write_plan", full)
    with pytest.raises(ConfigError, match=r"\(No space left on device\); free some space there, or"):
        clplat.run(study(), quiet=True)


def test_a_damaged_line_of_the_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"kind": "status", "status": "RUNNING", "reason": ""}\nrubbish\n')
    with pytest.raises(StorageError, match=r"journal\.jsonl, line 2: damaged"):
        list(read(tmp_path))


def test_a_study_in_the_place_of_a_run_is_refused_with_its_runs(tmp_path: Path) -> None:
    done = clplat.run(study(), quiet=True)
    with pytest.raises(ConfigError, match="is a study; name one of its runs: digits-s0"):
        clplat.load_model(done.folder)
