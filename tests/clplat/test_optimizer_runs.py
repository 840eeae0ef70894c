"""Optimizers of nested learning in real runs: from YAML, killed and resumed, scheduled, refused with the key named."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import assert_same, everything, run_folder, study

from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import last_status
from clplat.learner import Learner
from clplat.strategies.optimizers.joined import matches
from clplat.strategies.world import World
from clplat.study_file import expand, find, load_study
from clplat.yaml_text import parse_yaml

FORK = multiprocessing.get_context("fork")
PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
OTHERS = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
LEVELS: dict[str, Any] = {
    "class_path": "LevelClock",
    "init_args": {
        "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        "levels": {
            "slow": {"match": ["body.*"], "period": 5,
                     "optimizer": {"class_path": "M3", "init_args": {"period": 2, "others": OTHERS}}},
            "delta": {"match": ["head.weight"], "period": 3,
                      "optimizer": {"class_path": "DGD", "init_args": {"lr": 0.1, "erase": 0.01}}},
            "fast": {},
        },
    },
}  # fmt: skip


def optimized(optimizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return study(training__optimizer=optimizer, **changes)


def with_levels(**changes: Any) -> dict[str, Any]:
    """Twelve steps a task, so that periods of 5 are left unfinished; scheduled over the stream."""
    return optimized(LEVELS, training__optimizer_state="keep", training__schedule="cosine",
                     training__schedule_span="stream", **changes)  # fmt: skip


def in_child(action: Any) -> int:
    child = FORK.Process(target=action)
    child.start()
    child.join(timeout=600)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def killed_after(folder: Path, steps: int) -> None:
    """Execute the run and die by SIGKILL after so many optimizer steps."""
    original = Learner.batch_done

    def counting(self: Learner) -> None:
        original(self)
        if self.global_steps == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    Learner.batch_done = counting  # type: ignore[method-assign]
    execute(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("whole"), with_levels())
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    return folder


@pytest.mark.parametrize("steps", [7, 23])
def test_killed_inside_a_period_and_resumed_a_run_equals_the_uninterrupted_one(
    whole: Path, tmp_path: Path, steps: int
) -> None:
    folder = run_folder(tmp_path, with_levels())
    assert in_child(lambda: killed_after(folder, steps)) == -signal.SIGKILL
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))
    ends = [Checkpoints(one, every_seconds=0).load() for one in (whole, folder)]
    assert ends[0] is not None and ends[1] is not None
    assert_same(ends[0]["optimizer"], ends[1]["optimizer"])


def test_what_a_task_left_unfinished_goes_on_in_the_next(whole: Path) -> None:
    state = Checkpoints(whole, every_seconds=0).load()
    assert state is not None
    clocks = {group["level"]: group["clock"] for group in state["optimizer"]["param_groups"]}
    assert state["global_steps"] == 36 and clocks == {"slow": 36 % 5, "delta": 0, "fast": 0}
    assert any("pending" in kept for kept in state["optimizer"]["state"].values())


def test_a_schedule_acts_on_every_level(whole: Path) -> None:
    state = Checkpoints(whole, every_seconds=0).load()
    assert state is not None
    groups = state["optimizer"]["param_groups"]
    assert [group["level"] for group in groups] == ["slow", "slow", "delta", "fast"]
    assert [group["initial_lr"] for group in groups] == [0.02, 0.01, 0.1, 0.05]
    assert all(group["lr"] < 0.01 * group["initial_lr"] for group in groups)


@pytest.mark.long
def test_two_processes_give_the_weights_and_the_optimizer_of_one(tmp_path: Path) -> None:
    """In double precision: Newton-Schulz and Adam make directions of no gradient as long as all others, and in single
    precision what stands there is the order of a sum."""
    data = with_levels(
        training__budget={"steps": 4}, training__precision="64-true", architecture__init_args__dropout=0.0
    )
    alone = run_folder(tmp_path, data, "alone")
    together = run_folder(
        tmp_path, data | {"training": data["training"] | {"devices": 2, "accelerator": "cpu"}}, "both"
    )
    states = []
    for folder in (alone, together):
        outcome = execute(folder)
        assert outcome.status == "FINISHED", outcome.reason
        states.append(Checkpoints(folder, every_seconds=0).load())
    one, both = states
    assert one is not None and both is not None
    torch.testing.assert_close(both["architecture"], one["architecture"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "training.optimizer_state: reset would drop .* use keep, or accept it with unfinished: drop"),
        ({"levels": {"a": {"period": 1000}}, "unfinished": "drop"},
         "training.optimizer: level a steps once in 1000 steps, and never does where a task has 12 .* use keep"),
        ({"levels": {"a": {"match": ["hed.*"]}}}, "training.optimizer.init_args: levels.a.match: .* body.1.weight"),
        ({"levels": {"a": {"perod": 2}}}, "training.optimizer.init_args.levels: Level has no option 'perod'.*'period'"),
        ({"levels": {"a": {"period": "often"}}}, "training.optimizer.init_args.levels.period: expected a whole number"),
        ({"optimizer": {"class_path": "SGD", "init_args": {"rate": 1}}},
         "training.optimizer.init_args.optimizer: SGD has no option 'rate'"),
        ({"optimizer": {"class_path": "Muon"}, "levels": {"a": {}}}, "init_args: optimizer: others: Muon takes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_key_before_anything_is_trained(change: dict[str, Any], message: str) -> None:
    data = optimized(LEVELS | {"init_args": LEVELS["init_args"] | change})
    with pytest.raises(ConfigError, match=message):
        parts = assemble(expand(load_study(data))[0], World())
        parts.learner.configure_optimizers()


def test_a_level_that_the_run_was_too_short_for_is_named_at_its_end(tmp_path: Path) -> None:
    levels = {"a": {"match": ["head.*"], "period": 1000}, "b": {"match": ["body.*"], "period": 2}}
    made = LEVELS | {"init_args": LEVELS["init_args"] | {"levels": levels}}
    data = optimized(made, training__optimizer_state="keep")
    with pytest.warns(UserWarning, match="level a has never stepped: its period is 1000 steps, and the run") as said:
        assert execute(run_folder(tmp_path, data, "run")).status == "FINISHED"
    assert not [one for one in said if "level b" in str(one.message)]


EXAMPLES = [parse_yaml(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)]


def name_of(example: dict[str, Any]) -> str:
    return str(example["training"]["optimizer"]["class_path"])


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_of_the_page_trains_the_small_transformer(example: dict[str, Any], tmp_path: Path) -> None:
    data = parse_yaml(find("quickstart_text").read_text(encoding="utf-8"))
    data["training"] |= {"budget": {"steps": 8}, "batch_size": 4, "schedule": "constant"} | example["training"]
    data["architecture"]["init_args"] |= {"hidden_size": 16}
    data |= {"variants": {}, "baseline": None, "evaluation": {"batch_size": 4, "max_rows": 2}}
    data |= {"checkpoint": {"every_seconds": 1e9}, "tracking": {"enabled": False, "system_metrics": False}}
    folder = run_folder(tmp_path, data)
    before = assemble(expand(load_study(data))[0], World()).architecture.state_dict()
    assert execute(folder).status == "FINISHED"
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    still = {name for name, weight in state["architecture"].items() if torch.equal(weight, before[name])}
    # Three tasks of eight steps; with a new optimizer each, a period has to end inside one.
    counted = 24 if example["training"].get("optimizer_state") == "keep" else 8
    levels = example["training"]["optimizer"]["init_args"].get("levels", {}).values()
    slow = [level["match"] for level in levels if level.get("period", 1) > counted]
    assert still == {name for name in before if any(matches(name, patterns) for patterns in slow)}


def test_the_page_has_an_example_of_every_optimizer() -> None:
    assert {name_of(example) for example in EXAMPLES} == {
        "DGD", "DeltaMomentum", "DeepMomentum", "Muon", "M3", "LevelClock"
    }  # fmt: skip
