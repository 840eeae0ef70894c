"""Strategies that rehearse, in whole runs: Lightning's step between the hooks, interruptions inside tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from studies import assert_same, everything, run_folder, study

from clplat.dry_run import estimate
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import last_status
from clplat.learner import Learner
from clplat.study import preflight
from clplat.study_file import expand, load_study

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gem": ("GEM", {"patterns_per_task": 20}),
    "erace": ("ERACE", {"capacity": 40}),
    "der": ("DER", {"capacity": 40}),
    "scr": ("SCR", {"capacity": 40}),
    "icarl": ("iCaRL", {"capacity": 40}),
    "lamaml": ("LaMAML", {"capacity": 40}),
    "lamaml2": ("LaMAML", {"capacity": 40, "second_order": True}),
    "gdumb": ("GDumb", {"capacity": 40}),
}


def named(case: str) -> dict[str, Any]:
    name, options = CASES[case]
    return {case: {"class_path": name, "init_args": options}}


class Killed(Exception):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_inside_its_second_task_and_resumed_equals_the_uninterrupted_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = study(strategies=named(case), evaluation__every=5)
    whole, stopped = run_folder(tmp_path / "whole", data), run_folder(tmp_path / "stopped", data)
    execute(whole)
    original = Learner.training_step

    def training_step(self: Learner, *arguments: Any) -> None:
        if self.global_steps == 17:
            raise Killed
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", training_step)
        execute(stopped)
    assert last_status(stopped) == "FAILED"
    execute(stopped)
    assert last_status(stopped) == last_status(whole) == "FINISHED"
    assert_same(everything(whole), everything(stopped))


def test_a_dry_run_tries_each_of_them() -> None:
    table = estimate(load_study(study(variants={case: {"strategies": named(case)} for case in CASES})), Console())
    assert table.row_count == len(CASES)


def test_momenta_that_would_outlive_a_fresh_start_are_refused() -> None:
    data = study(strategies=named("gdumb"), training__optimizer_state="keep")
    with pytest.raises(ConfigError, match=r"training\.optimizer_state: strategies\.gdumb .* use reset"):
        preflight(expand(load_study(data)))
