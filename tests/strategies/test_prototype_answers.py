"""Answers from prototypes beside other strategies: whose rows they come from, and that training is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies import assert_same, everything, run_folder, study

from clplat.execution import execute
from clplat.journal import table

PROTOTYPES = {"class_path": "PrototypeAnswers", "init_args": {"per_class": 4}}


def run(folder: Path, **strategies: Any) -> Path:
    made = run_folder(folder, study(strategies=strategies))
    execute(made)
    return made


def test_the_weights_are_those_of_training_without_it_and_the_answers_are_not(tmp_path: Path) -> None:
    plain, answered = run(tmp_path / "plain"), run(tmp_path / "answered", answers=PROTOTYPES)
    assert_same(everything(plain)["architecture"], everything(answered)["architecture"])
    assert table(plain) != table(answered)


def test_beside_joint_every_class_has_its_rows(tmp_path: Path) -> None:
    made = run(tmp_path, data={"class_path": "Joint"}, answers=PROTOTYPES)
    labels = everything(made)["strategies"]["answers"]["state"]["buffer"]["rows"]["targets"]
    assert labels.bincount().tolist() == [4] * 6
