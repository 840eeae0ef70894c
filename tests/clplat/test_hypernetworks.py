"""Hypernetworks in whole runs: resumed after growth, trained by several processes, with statistics and replay."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import REPLAY, assert_same, everything, run_folder, study

import clplat
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import last_status, table
from clplat.learner import Learner
from clplat.streams.scorers import Scorer

HOLD = {"class_path": "HypernetworkRegularizer", "init_args": {"strength": 0.01, "tasks_per_step": 1}}
TARGET = {"class_path": "MLP", "init_args": {"hidden_sizes": [16]}}
SMALL = {"target": TARGET, "chunk_size": 200, "task_embedding": 8, "chunk_embedding": 8}


def grown(scenario: str = "class", **options: Any) -> dict[str, Any]:
    architecture = {"class_path": "RecurrentHypernetwork", "init_args": SMALL | {"hidden_size": 12} | options}
    return study(
        architecture=architecture, strategies={"hold": HOLD}, stream__init_args__scenario=scenario,
        training__optimizer={"class_path": "Adam", "init_args": {"lr": 1e-3}},
    )  # fmt: skip


def in_child(action: Callable[[], Any]) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(timeout=600)
    return child.exitcode


def killed_at(folder: Path, owner: type, name: str, count: int) -> None:
    """Execute the run and die by SIGKILL at the end of the count-th call of a method."""
    original, calls = getattr(owner, name), iter(range(count))

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if next(calls) == count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counting)
    execute(folder)


MOMENTS = [
    (Learner, "training_step", 30, True), (Learner, "batch_done", 19, False), (Checkpoints, "save", 16, True),
    (Scorer, "score", 5, False),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "count", "freeze_grown"), MOMENTS)
def test_a_grown_run_that_is_killed_and_resumed_equals_the_uninterrupted_one(
    tmp_path: Path, owner: type, name: str, count: int, freeze_grown: bool
) -> None:
    data = grown(grow_by=3, freeze_grown=freeze_grown)
    whole, folder = run_folder(tmp_path, data, "whole"), run_folder(tmp_path, data)
    assert in_child(lambda: execute(whole)) == 0
    assert in_child(lambda: killed_at(folder, owner, name, count)) == -signal.SIGKILL
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))


def test_a_frozen_growing_run_forgets_nothing_to_the_last_bit(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, grown("task", grow_by=3))
    assert execute(folder).status == "FINISHED"
    scores = {(cell.task, row): cell.value for row in (1, 2, 3) for cell in table(folder).cells(row)
              if cell.metric == "loss"}  # fmt: skip
    tasks = list(dict.fromkeys(task for task, _ in scores))
    assert scores[tasks[0], 1] == scores[tasks[0], 2] == scores[tasks[0], 3]
    assert scores[tasks[1], 2] == scores[tasks[1], 3] != scores[tasks[1], 1]


def test_a_trained_and_grown_model_is_loaded_from_its_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, grown(grow_by=3))
    assert execute(folder).status == "FINISHED"
    model, state = clplat.load_model(folder), Checkpoints(folder, every_seconds=0).load()
    assert state is not None and model.stages == [0, 1, 2]
    assert_same(dict(model.state_dict()), state["architecture"])


@pytest.mark.parametrize("arm", ["hold", pytest.param("joint", marks=pytest.mark.long)])
def test_two_processes_give_the_weights_of_one(tmp_path: Path, arm: str) -> None:
    data = grown("task") if arm == "hold" else grown("task") | {"strategies": {"all": {"class_path": "Joint"}}}
    data["training"] |= {"budget": {"steps": 6}}
    several = data | {"training": data["training"] | {"devices": 2, "accelerator": "cpu"}}
    alone, together = run_folder(tmp_path, data, "alone"), run_folder(tmp_path, several, "together")
    for folder in (alone, together):
        outcome = execute(folder)
        assert outcome.status == "FINISHED", outcome.reason
    one, both = (Checkpoints(folder, every_seconds=0).load() for folder in (alone, together))
    assert one is not None and both is not None
    for name, weight in one["architecture"].items():
        torch.testing.assert_close(both["architecture"][name], weight, rtol=1e-3, atol=1e-4)


def test_an_optimizer_kept_over_growth_is_refused_by_name(tmp_path: Path) -> None:
    data = grown(grow_by=3)
    data["training"]["optimizer_state"] = "keep"
    outcome = execute(run_folder(tmp_path, data))
    assert outcome.status == "FAILED"
    assert "training.optimizer_state: needs a model that keeps its shape" in outcome.reason


@pytest.mark.parametrize("extra", [{"replay": REPLAY}, {"all": {"class_path": "Cumulative"}}])
def test_statistics_of_batchnorm_and_replay_go_together(tmp_path: Path, extra: dict[str, Any]) -> None:
    target = {"class_path": "ResNet32", "init_args": {"width": 2}}
    architecture = {"class_path": "ChunkedHypernetwork", "init_args": SMALL | {"target": target, "chunk_size": 500}}
    data = grown("task") | {"architecture": architecture, "strategies": {"hold": HOLD} | extra}
    data["training"] |= {"budget": {"steps": 3}}
    folder = run_folder(tmp_path, data)
    outcome = execute(folder)
    assert outcome.status == "FINISHED", outcome.reason
