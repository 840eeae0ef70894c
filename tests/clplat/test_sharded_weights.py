"""Weights sharded over processes are trained to what whole ones become, are saved whole, and refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from every_component import SMALL, digits, part, strategies, text
from group_runs import ended
from studies import assert_same

from clplat.checkpoint import Checkpoints
from clplat.components import catalogue, resolve
from clplat.errors import ConfigError
from clplat.study import preflight
from clplat.study_file import expand, load_study

FOUR = ("Naive", "ExperienceReplay", "DERpp", "EWC")


def cases() -> dict[str, dict[str, Any]]:
    """Rows of weights that two processes cannot share evenly, gradients clipped, momenta kept, scored inside tasks."""
    given = {
        "architecture": part("MLP", hidden_sizes=[13, 7]), "training__clip_norm": 0.5,
        "training__optimizer_state": "keep", "evaluation": {"every": 2}, "tracking__log_every": 2,
        "training__optimizer": part("AdamW", lr=1e-2), "training__accumulate": 2,
    }  # fmt: skip
    found = {name: digits(strategies=strategies()[name]["strategies"], **given) for name in FOUR}
    return found | {"blocks": text(part("Transformer", **SMALL), strategies={"own": part("EWC", strength=5.0)})}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("sharded")
    whole = cases()
    shared = {f"shared-{n}": {**c, "training": c["training"] | {"sharding": "fsdp"}} for n, c in whole.items()}
    stopped = {f"stopped-{name}": shared[f"shared-{name}"] for name in ("ExperienceReplay", "EWC")}
    yield folder, ended(folder, {f"whole-{n}": c for n, c in whole.items()} | shared | stopped)


@pytest.mark.parametrize("name", [*FOUR, "blocks"])
def test_sharded_weights_become_what_whole_ones_do(runs: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    first, second = ({kind: rank[f"{kind}-{name}"] for kind in ("whole", "shared")} for rank in runs[1])
    for key in ("rows", "weights", "strategies", "random"):
        assert_same(first["shared"][key], second["shared"][key], key)
    for weight, value in first["whole"]["weights"].items():
        torch.testing.assert_close(first["shared"]["weights"][weight], value, rtol=1e-4, atol=1e-6, msg=weight)
    for ours, theirs in zip(first["shared"]["rows"], first["whole"]["rows"], strict=True):
        assert [c["value"] for c in ours] == pytest.approx([c["value"] for c in theirs], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", ["ExperienceReplay", "EWC"])
def test_a_sharded_run_that_was_stopped_inside_a_task_ends_as_if_it_had_not_been(
    runs: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    for rank in runs[1]:
        for key in ("rows", "weights", "strategies", "random"):
            assert_same(rank[f"stopped-{name}"][key], rank[f"shared-{name}"][key], key)


def test_each_process_holds_its_share_of_the_weights_and_of_the_optimizer(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    whole = sum(weight.numel() for weight in runs[1][0]["shared-EWC"]["weights"].values())
    held = [rank["stopped-EWC"]["held"] for rank in runs[1]]
    assert sum(held) == 3 * whole and max(held) < 0.6 * 3 * whole, "weights and both of AdamW's moments"


def test_checkpoints_of_sharded_weights_hold_whole_plain_tensors(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    states = [Checkpoints(runs[0] / f"{kind}-EWC" / "run", every_seconds=0).load() for kind in ("whole", "shared")]
    whole, shared = ([state[key] for key in ("architecture", "optimizer")] for state in states if state is not None)
    one, both = (torch.utils._pytree.tree_leaves(each) for each in (whole, shared))
    assert len(one) == len(both) > 20
    for ours, theirs in zip(both, one, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", sorted(strategies().keys() - set(FOUR)))
def test_every_other_strategy_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^strategies\.\w+: (?P<class>\w+) .*training\.sharding: fsdp.*sharding: none"
    ):
        refuse(strategies()[name], {})


def test_four_classes_and_no_other_say_that_they_take_sharded_weights() -> None:
    found = {name for name in catalogue("strategy") if vars(resolve(name, "strategy", "x")).get("shards", False)}
    assert found == set(FOUR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 1}, r"^training\.devices: 1 process"),
        ({"compile": True}, r"^training\.compile: .*set it to false"),
        ({"precision": "16-mixed"}, r"^training\.precision: .*use bf16-mixed"),
        ({"optimizer": part("Muon", lr=0.1)}, r"^training\.optimizer: Muon .*use one of torch's SGD"),
        ({"sharding": "zero"}, r"^training\.sharding: .*'none' or 'fsdp'"),
    ],
)
def test_settings_that_do_not_go_with_sharded_weights_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse(digits(), changes)


def test_a_model_that_reads_whole_weights_after_each_step_is_refused() -> None:
    model = part("TRC2", hidden_size=32, num_layers=2, column={"num_heads": 4})
    with pytest.raises(ConfigError, match=r"^architecture: TRC2 reads whole weights .*sharding: none"):
        refuse(text(model), {})


def refuse(data: dict[str, Any], changes: dict[str, Any]) -> None:
    given = {"sharding": "fsdp", "devices": 2, "accelerator": "cpu"}
    preflight(expand(load_study(data | {"training": data["training"] | given | changes})))
