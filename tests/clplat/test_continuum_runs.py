"""Continuum memories in real runs: from YAML, stopped inside a period and resumed, begun with another run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from studies import run_folder, study

from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import read
from clplat.strategies.world import World
from clplat.study_file import expand, load_study

LEVELS: list[dict[str, Any]] = [{"period": 1}, {"period": 5, "lr": 0.01}, {"period": 4, "clock": "token"}]
STREAM = {"class_path": "MQAR", "init_args": {"pairs": [2, 3], "lengths": [12], "vocab_size": 16, "train_rows": 64,
                                             "val_rows": 8, "test_rows": 8, "multiples": []}}  # fmt: skip


def continuum(*, carry: str = "sequential", **options: Any) -> dict[str, Any]:
    memory = {"class_path": "ContinuumMemory", "init_args": {"levels": LEVELS, "carry": carry}}
    attention = {"class_path": "AttentionLayer", "init_args": {"num_heads": 2}}
    layers = {"hidden_size": 16, "layers": [attention, "TitansLMM"], "feed_forward": memory}
    optimizer = {"class_path": "LevelClock", "init_args": {"optimizer": {"class_path": "AdamW", "init_args": {}}}}
    return study(
        stream=STREAM, architecture={"class_path": "MemoryTransformer", "init_args": layers | options},
        training={"budget": {"steps": 7}, "batch_size": 4, "optimizer": optimizer, "optimizer_state": "keep"},
    )  # fmt: skip


def test_a_run_stopped_inside_a_period_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert_resumes_as_if_never_stopped(continuum(), step=8, folder=tmp_path)
    state = Checkpoints(tmp_path / "whole" / "run", every_seconds=0).load()
    assert state is not None
    clocks = {group["level"]: group["clock"] for group in state["optimizer"]["param_groups"]}
    assert clocks == {"step1": 0, "step5": 14 % 5, "rest": 0}
    told = [entry["values"] for entry in read(tmp_path / "whole" / "run") if entry["kind"] == "tags"]
    assert any(tags.get("architecture.level.token4") == "4 tokens, local loss" for tags in told)


def test_a_nested_run_stopped_inside_the_slow_period_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert_resumes_as_if_never_stopped(continuum(carry="nested"), step=8, folder=tmp_path)
    state = Checkpoints(tmp_path / "whole" / "run", every_seconds=0).load()
    assert state is not None
    groups = {group["level"]: group["params"] for group in state["optimizer"]["param_groups"]}
    # The last of 14 steps lies inside a period of 5: what is carried on has moved from where it began.
    assert {level for level, own in groups.items() if any("start" in state["optimizer"]["state"][n] for n in own)} == {
        "step1"
    }


def test_a_run_may_begin_with_the_checkpoint_of_another(tmp_path: Path) -> None:
    attention = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    base = continuum() | {"architecture": {"class_path": "Transformer", "init_args": attention}}
    base["training"] |= {"optimizer": {"class_path": "AdamW", "init_args": {}}}
    folder = run_folder(tmp_path, base)
    assert execute(folder).status == "FINISHED"
    path = max((folder / "checkpoints").glob("*.pt"))
    layer = {"class_path": "AttentionLayer", "init_args": {"num_heads": 2}}
    data = continuum(layers=[layer] * 2, start_from=str(path))
    parts = assemble(expand(load_study(data))[0], World())
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    own, trained = parts.architecture.state_dict(), state["architecture"]
    level, layer_name = "blocks.1.mlp.levels.step5.mlp.down.weight", "blocks.0.attention.attention.qkv.weight"
    assert torch.equal(own[level], trained["blocks.1.mlp.down.weight"])
    assert torch.equal(own[layer_name], trained["blocks.0.attention.qkv.weight"])


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ([{"period": 1}, {"period": 5}], "AdamW would step the model's level step5 at every step, .* period 5.; use"),
        ([{"period": 1, "lr": 0.5}], "AdamW would step the model's level step1 .*period 1, lr 0.5.; use"),
        ([{"period": 1}, {"period": 4, "clock": "token"}], None),
    ],
    ids=["period", "rate", "neither"],
)
def test_levels_that_nothing_would_clock_are_refused_before_a_step(levels: list[dict[str, Any]], said: str) -> None:
    data = continuum(feed_forward={"class_path": "ContinuumMemory", "init_args": {"levels": levels}})
    data["training"]["optimizer"] = {"class_path": "AdamW", "init_args": {}}
    learner = assemble(expand(load_study(data))[0], World()).learner
    if said is None:
        assert learner.configure_optimizers().param_groups
        return
    with pytest.raises(ConfigError, match=f"training.optimizer: {said} .class_path: LevelClock, init_args: "):
        learner.configure_optimizers()
