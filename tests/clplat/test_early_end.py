"""A task that ends once thresholds are reached: on which metrics, refused how, and the same after an interruption."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from studies import assert_same, everything, parity, run_folder, study

from clplat.checkpoint import Checkpoints
from clplat.config import RunConfig, parse
from clplat.errors import ConfigError
from clplat.evaluation import Evaluator
from clplat.execution import execute
from clplat.journal import last_status, table
from clplat.study import preflight
from clplat.study_file import expand, load_study

FORK = multiprocessing.get_context("fork")

UNTIL = {"accuracy": 0.9, "newest_accuracy": 0.8}
NO_VALIDATION = {"val_fraction": 0}


def learned(until: Any = UNTIL, steps: int = 60, **changes: Any) -> dict[str, Any]:
    """A parity study that reaches 0.9 within its budget."""
    return parity(
        stream__init_args={"last": 3, "train_rows": 4000, "val_rows": 200, "test_rows": 200},
        architecture__init_args__hidden_size=48,
        training__budget={"steps": steps, "until": until},
        training__optimizer={"class_path": "Adam", "init_args": {"lr": 5e-3}},
        training__optimizer_state="keep",
        evaluation__every=5,
        **changes,
    )


def steps(folder: Path) -> list[int]:
    """Optimizer steps of each task."""
    ends = table(folder).steps()
    return [after - before for before, after in zip(ends, ends[1:])]


def test_a_task_goes_on_until_every_metric_has_reached_its_threshold(tmp_path: Path) -> None:
    taken = {}
    for name, until in {
        "both": {"accuracy": 0.0, "newest_accuracy": 0.0},
        "first": {"accuracy": 1.0, "newest_accuracy": 0.0},
        "second": {"accuracy": 0.0, "newest_accuracy": 1.0},
        "low": {"loss": 100.0},
        "headline": 0.0,
    }.items():
        folder = run_folder(tmp_path, learned(until, steps=10), name)
        assert execute(folder).status == "FINISHED"
        taken[name] = steps(folder)
    assert taken == {"both": [5, 5], "first": [10, 10], "second": [10, 10], "low": [5, 5], "headline": [5, 5]}


def in_child(action: Any) -> int:
    child = FORK.Process(target=action)
    child.start()
    child.join(timeout=300)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def killed(folder: Path, *, saves_after_end: int) -> None:
    """Execute the run and die right behind the save so many saves after the first task's end was decided."""
    decide, save = Evaluator.reached, Checkpoints.save
    left: list[int] = []

    def deciding(self: Evaluator, *args: Any) -> bool:
        found = decide(self, *args)
        if found and not left:
            left.append(saves_after_end)
        return found

    def saving(self: Checkpoints, *args: Any) -> Any:
        result = save(self, *args)
        if left:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    Evaluator.reached, Checkpoints.save = deciding, saving
    execute(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("whole"), learned())
    assert in_child(lambda: execute(folder)) == 0
    return folder


# 1 is the save of the step that reached the threshold, from which an unknowing run would train on.
@pytest.mark.parametrize("saves_after_end", [1, 2, 3, 6])
def test_a_run_killed_around_an_early_end_equals_the_uninterrupted_one(
    whole: Path, tmp_path: Path, saves_after_end: int
) -> None:
    assert steps(whole)[0] < 60
    folder = run_folder(tmp_path, learned())
    assert in_child(lambda: killed(folder, saves_after_end=saves_after_end)) == -signal.SIGKILL
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))
    assert steps(whole) == steps(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (study(training__budget={"steps": 5, "until": 0.9}), "until: is looked at .* set evaluation.every"),
        (
            study(training__budget={"steps": 5, "until": 0.9}, evaluation__every=2, stream__init_args=NO_VALIDATION),
            "until: task 'classes-0-1' has no validation set",
        ),
        (learned({"newest": 0.9}), "of 'parity-2' has no metric 'newest'; known: accuracy, loss, newest_accuracy"),
        (learned({}), "until names no metric"),
        (learned({"accuracy": 98}), "until: accuracy 98 would never be reached, the best there can be is 1"),
        (
            parity(architecture={"class_path": "TextClassifier", "init_args": {}}),
            "TextClassifier answers one question about a sample, and this stream asks 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(expand(load_study(data)))


def test_thresholds_are_part_of_the_experiment_and_survive_being_written_down(tmp_path: Path) -> None:
    config = expand(load_study(learned()))[0]
    assert config.training.budget.until == {"accuracy": 0.9, "newest_accuracy": 0.8}
    assert str(config.training.budget) == "60 steps, at most until accuracy 0.9 and newest_accuracy 0.8"
    from clplat.config import difference, load_run, plain, save

    save(config, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == config
    other = plain(config)
    other["training"]["budget"]["until"]["accuracy"] = 0.8
    assert difference(config, parse(RunConfig, other)) == ["training.budget.until.accuracy: 0.9 → 0.8"]
