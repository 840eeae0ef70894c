"""Soft prompts before a pretrained model in runs: resumed exactly, grown by task, refused where they cannot stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from question_runs import run_of
from studies import run_folder

from clplat.api import load_model
from clplat.assembly import assemble
from clplat.config import load_run
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import read, table
from clplat.strategies.world import World
from clplat.study import preflight

PROMPTS: dict[str, dict[str, Any]] = {
    "progressive": {"class_path": "ProgressivePrompts", "init_args": {"length": 3}},
    "pool": {"class_path": "PromptPool", "init_args": {"size": 4, "length": 2, "top_k": 2, "query_tokens": 3}},
}


def prompted(places: tuple[Path, Path], cache: Path, name: str) -> dict[str, Any]:
    model = {"class_path": "Prompted", "init_args": {"name": str(places[1])}}
    return run_of(places, cache, architecture=model, strategies={"prompts": PROMPTS[name]})


@pytest.mark.parametrize("name", PROMPTS)
def test_a_stopped_run_with_prompts_goes_on_as_if_it_had_not_been(
    places: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    assert_resumes_as_if_never_stopped(prompted(places, tmp_path / "cache", name), step=9, folder=tmp_path)


def test_progressive_prompts_grow_by_one_a_task_and_the_first_stays_as_its_task_left_it(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    data = prompted(places, tmp_path / "cache", "progressive")
    data["checkpoint"] = {"every_seconds": 60, "snapshots": "boundary"}
    data["training"] |= {"budget": {"steps": 80}, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}}}
    folder = run_folder(tmp_path, data)
    assert execute(folder).status == "FINISHED"
    first, second = (torch.load(path, weights_only=True) for path in sorted((folder / "snapshots").glob("*.pt")))
    assert second["structure"]["shown"] == ["task1", "task0"] and second["structure"]["trained"] == ["task1"]
    kept = [state["architecture"]["prompts.task0"] for state in (first, second)]
    assert torch.equal(kept[0], kept[1]) and len(kept[0]) == 3
    scores = table(folder).scores()
    assert scores[1][0] > scores[0][0] and scores[2][1] > scores[1][1]


def test_a_pool_learns_prompts_and_keys_and_says_in_the_record_how_far_they_are(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, prompted(places, tmp_path / "cache", "pool"))
    assert execute(folder).status == "FINISHED"
    model, fresh = load_model(folder), assemble(load_run(folder / "config.yaml"), World()).architecture
    assert not torch.equal(model.pool["key"], fresh.pool["key"])
    assert not torch.equal(model.pool["prompt"], fresh.pool["prompt"])
    names = {name for entry in read(folder) if entry["kind"] == "metric" for name in entry["values"]}
    assert [name for name in names if "prompt_matching" in name], names


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_before_a_model_that_takes_none_are_a_configuration_error(
    places: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    data = run_of(places, tmp_path / "cache", strategies={"prompts": PROMPTS[name]})
    with pytest.raises(ConfigError, match=r"takes no prompts; use Prompted"):
        assemble(load_run(run_folder(tmp_path, data) / "config.yaml"), World())


def test_a_model_without_a_trained_weight_is_refused_and_prompts_that_come_with_a_task_are_not(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    def tried(name: str, strategies: dict[str, Any]) -> None:
        data = prompted(places, tmp_path / "cache", "progressive") | {"strategies": strategies}
        preflight([load_run(run_folder(tmp_path / name, data) / "config.yaml")])

    tried("one", {"prompts": PROMPTS["progressive"]})
    with pytest.raises(ConfigError, match="nothing of Prompted is trained; give it a strategy"):
        tried("none", {})
    long = {"class_path": "ProgressivePrompts", "init_args": {"length": 300}}
    with pytest.raises(ConfigError, match=r"ProgressivePrompts: the model's context has room for .* of . tasks: lower"):
        tried("long", {"prompts": long})
    with pytest.raises(ConfigError, match="strategies.a: ProgressivePrompts: PromptPool shows each text"):
        tried("both", {"a": PROMPTS["progressive"], "b": PROMPTS["pool"]})
