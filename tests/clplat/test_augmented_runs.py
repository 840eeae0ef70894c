"""Augmentation in a run: every training use, no evaluation, no buffer; and resuming stays exact."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import assert_same, everything, run_folder, study
from written_images import as_tensor, cifar10_parquet

from clplat.architectures.mlp import MLP
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import last_status
from clplat.learner import Learner
from clplat.streams.augmentation import CropAndFlip
from clplat.streams.images import CIFAR10

FORK = multiprocessing.get_context("fork")
REPLAY = {"class_path": "ExperienceReplay", "init_args": {"capacity": 10}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes folders of a two-task run of 12 steps with replay, on 32 images of four classes."""
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    cifar10_parquet(tmp_path / "images")
    stream = {"source": "parquet", "root": str(tmp_path / "images"), "class_order": [0, 1, 2, 3], "num_tasks": 2}
    data = study(
        stream={"class_path": "SplitCIFAR10", "init_args": stream}, strategies={"replay": REPLAY},
        training__budget={"steps": 6}, training__batch_size=8, training__optimizer__init_args={"lr": 0.01},
        evaluation={"every": 4},
    )  # fmt: skip
    return lambda name: run_folder(tmp_path, data, name)


def in_child(action: Any) -> int | None:
    child = FORK.Process(target=action)
    child.start()
    child.join(timeout=120)
    return child.exitcode


def killed_at_step(folder: Path, step: int) -> None:
    original = Learner.training_step

    def stepping(self: Learner, *args: Any) -> None:
        original(self, *args)
        if self.global_steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Learner.training_step = stepping
    execute(folder)


def test_an_augmented_run_that_was_killed_and_resumed_equals_the_uninterrupted_one(run: Any) -> None:
    whole, folder = run("whole"), run("killed")
    assert in_child(lambda: execute(whole)) == 0
    for step in (3, 8):
        assert in_child(lambda: killed_at_step(folder, step)) == -signal.SIGKILL  # noqa: B023
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))


def test_every_training_row_is_augmented_once_and_no_evaluated_or_stored_one(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    original = MLP.forward

    def watched(self: MLP, batch: Any, *args: Any) -> Any:
        seen[self.training].append(batch.inputs)
        return original(self, batch, *args)

    monkeypatch.setattr(MLP, "forward", watched)
    monkeypatch.setattr(CropAndFlip, "__call__", lambda self, images: images + 100)
    folder = run("watched")
    execute(folder)
    assert last_status(folder) == "FINISHED"
    assert [len(rows) for rows in seen[True]] == [8] * 6 + [16] * 6, "current rows, then as many replayed ones"
    assert all(bool((rows > 50).all() and (rows < 150).all()) for rows in seen[True])
    assert seen[False] and all(bool((rows < 50).all()) for rows in seen[False])
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    stored = state["strategies"]["replay"]["state"]["buffer"]["rows"]["inputs"]
    written = as_tensor(cifar10_parquet(tmp_path / "again")["train"])
    plain = CIFAR10.data(written, torch.zeros(len(written)), task=0).batch(torch.arange(len(written))).inputs
    assert len(stored) == 10 and bool((stored.unsqueeze(1) == plain).flatten(2).all(2).any(1).all())


def test_augmentation_makes_a_difference(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, changed = run("plain"), run("changed")
    execute(changed)
    monkeypatch.setattr(CropAndFlip, "__call__", lambda self, images: images)
    execute(plain)
    weights = [everything(folder)["architecture"]["head.weight"] for folder in (plain, changed)]
    assert not torch.equal(*weights)
