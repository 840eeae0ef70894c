"""Strategies that rehearse, in whole runs: Lightning's step between the hooks, interruptions inside tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interruptions import assert_resumes_as_if_never_stopped
from rich.console import Console
from studies import study

from clplat.dry_run import estimate
from clplat.errors import ConfigError
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


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_inside_its_second_task_and_resumed_equals_the_uninterrupted_one(
    case: str, tmp_path: Path
) -> None:
    assert_resumes_as_if_never_stopped(study(strategies=named(case), evaluation__every=5), step=17, folder=tmp_path)


def test_a_dry_run_tries_each_of_them() -> None:
    table = estimate(load_study(study(variants={case: {"strategies": named(case)} for case in CASES})), Console())
    assert table.row_count == len(CASES)


def test_a_dry_run_of_an_arm_with_all_tasks_budgets_takes_two_steps_a_task_and_counts_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    original = Learner.batch_done

    def counting(self: Learner) -> None:
        original(self)
        taken.append(self.global_steps)

    monkeypatch.setattr(Learner, "batch_done", counting)
    joint = {"joint": {"strategies": {"data": {"class_path": "Joint"}}}}
    table = estimate(load_study(study(variants=joint, training__budget={"steps": 9})), Console())
    assert len(taken) == 2 * 3 and list(table.columns[2].cells) == [str(9 * 3)]


def test_a_dry_run_of_an_arm_that_trains_nothing_counts_no_step() -> None:
    table = estimate(
        load_study(study(variants={"zero": {"strategies": {"zero": {"class_path": "ZeroShot"}}}})), Console()
    )
    assert list(table.columns[2].cells) == ["0"]


def test_momenta_that_would_outlive_a_fresh_start_are_refused() -> None:
    data = study(strategies=named("gdumb"), training__optimizer_state="keep")
    with pytest.raises(ConfigError, match=r"training\.optimizer_state: strategies\.gdumb .* use reset"):
        preflight(expand(load_study(data)))
