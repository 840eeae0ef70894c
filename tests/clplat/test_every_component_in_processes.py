"""Every architecture and every strategy trains in two processes, which end alike and score what one alone would."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from every_component import REPLAYS, architectures, digits, part, strategies, with_files
from group_runs import carried_out, ended
from studies import assert_same, run_folder

from clplat.components import catalogue
from clplat.errors import ConfigError
from clplat.study import preflight
from clplat.study_file import expand, load_study

FEW = ("ConvNet", "HopeAttention", "TRC2", "ExperienceReplay", "iCaRL", "EWC", "GEM", "ReplayController")
"""Tried each time: statistics of batches, idle parameters, a store, buffers, a penalty, gradients, decisions."""
REMEMBERING = digits(architecture=part("remembering.RunningMean"))
ALONE = {
    "LaMAML": {"capacity": 20},
    "AvalanchePlugin": {"plugin": "avalanche.training.plugins.EWCPlugin", "arguments": {"ewc_lambda": 1.0}},
}
"""Refused by name for several processes."""
READS = {"Prequential", "TempLoRA", "Truncation"}
"""One process reads a text; Prequential, without which none of these runs, refuses more."""


def every(folder: Path) -> dict[str, dict[str, Any]]:
    return architectures() | strategies() | with_files(folder)


def test_every_architecture_and_strategy_is_tried_or_refused(tmp_path: Path) -> None:
    names = {*catalogue("architecture"), *catalogue("strategy")}
    named = every(tmp_path) | {name: {} for name in (*ALONE, *READS, "Locas", "Pretrained", "Prompted")}
    assert set(named) == names


@pytest.mark.parametrize("name", ALONE)
def test_what_one_process_must_do_alone_is_refused_by_name(name: str) -> None:
    data = digits(strategies={"own": part(name, **ALONE[name])}, training__devices=2, training__accelerator="cpu")
    with pytest.raises(ConfigError, match=r"strategies\.own: .*devices"):
        preflight(expand(load_study(data)))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes end with; one start of both for all of these cases."""
    cases = architectures() | strategies() | {"RunningMean": REMEMBERING}
    return ended(tmp_path_factory.mktemp("few"), {name: cases[name] for name in (*FEW, "RunningMean")})


def test_two_processes_end_alike_and_score_what_one_alone_would(few: list[dict[str, Any]]) -> None:
    assert set(few[0]) == {*FEW, "RunningMean"}
    assert_alike(*few)


@pytest.mark.long
def test_two_processes_end_alike_with_every_architecture_and_strategy(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "runs").mkdir()
    cases = every(tmp_path / "files")
    both = ended(tmp_path / "runs", cases)
    assert set(both[0]) == set(cases)
    assert_alike(*both)


def assert_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    """All that a run ends with, bit for bit; and scores that do not depend on how rows are dealt out."""
    for name, one in first.items():
        for key in ("rows", "weights", "buffers", "carried", "strategies", "random"):
            assert_same(one[key], second[name][key], f"{name}: {key}")
        for process in (one, second[name]):
            assert_scored_alike(process["last"], process["alone"], name)
        if name in REPLAYS:
            assert one["replay"] == [REPLAYS[name]["capacity"]], "both hold the budget of the whole run, and no more"


def assert_scored_alike(together: list[dict[str, Any]], alone: list[dict[str, Any]], name: str) -> None:
    """The result of half of the rows each is that of all rows by one process."""
    assert len(together) == len(alone) > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours["task"], ours["metric"], ours["count"]) == (theirs["task"], theirs["metric"], theirs["count"])
        same = math.isnan(ours["value"]) and math.isnan(theirs["value"])
        assert same or math.isclose(ours["value"], theirs["value"], rel_tol=1e-5, abs_tol=1e-7), (name, ours, theirs)


def test_a_memory_that_lives_as_long_as_the_run_is_the_same_on_all_processes_and_that_of_one(
    few: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = carried_out(run_folder(tmp_path, REMEMBERING), 0)["carried"]
    both = [process["RunningMean"]["carried"] for process in few]
    assert_same(both[0], both[1])
    assert float(alone["mean"].abs().sum()) > 0 and int(alone["steps"]) == int(both[0]["steps"]) == 6
    torch.testing.assert_close(both[0]["mean"], alone["mean"], rtol=1e-6, atol=1e-7)
