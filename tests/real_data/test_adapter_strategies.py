"""Continual-learning strategies on adapters of a real pretrained Llama of 260,000 weights, with TRACE's questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from studies import run_folder

from clplat.api import load_model
from clplat.architectures.adapters import backbone_checksum
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import table

ROOT = Path(__file__).parents[2]
CHECKSUM = "5892a0e030c69eb7aa54c4b9b0ea531cf679fbbb480163b9856b4e2259fa1e8d"
TENSORS = 30  # A and B of q, v and down in five layers


@pytest.fixture(scope="module")
def study(own_cache: None) -> dict[str, Any]:
    """The shipped study of adapters, its first two tasks, smaller still."""
    shipped = yaml.safe_load((ROOT / "configs" / "pretrained" / "adapters_tiny.yaml").read_text())
    options = shipped["stream"]["init_args"]
    for task in options["tasks"]:
        task["max_examples"] = 40
    options |= {"tasks": options["tasks"][:2], "max_answers": 0, "max_eval_rows": 4, "max_tokens": 48}
    shipped["training"] |= {"budget": {"steps": 5}, "batch_size": 8, "schedule": "constant"}
    return shipped | {
        "checkpoint": {"every_seconds": 0}, "seeds": [0], "baseline": None,
        "tracking": {"enabled": False, "log_every": 4, "system_metrics": False},
    }  # fmt: skip


def variant(study: dict[str, Any], name: str) -> dict[str, Any]:
    more: dict[str, Any] = {
        "agem": {
            "strategies": {"agem": {"class_path": "AGEM", "init_args": {"patterns_per_task": 8, "sample_size": 8}}}
        }
    }
    return study | {"variants": {name: (study["variants"] | more)[name]}}


def losses(folder: Path, view: str = "default") -> list[list[float]]:
    rows = table(folder)
    return [
        [cell.value for cell in rows.cells(row) if (cell.view, cell.metric) == (view, "loss")] for row in rows.rows()
    ]


@pytest.mark.parametrize(
    "name", ["seq", "er", "ewc", "gem", "agem", "joint", "olora", "one", "ilora_paper", "ilora_code_intent",
             "ilora_code_inert_ema", "zero_shot"]
)  # fmt: skip
def test_every_strategy_trains_adapters_alone_and_learns(
    data: Path, study: dict[str, Any], tmp_path: Path, name: str
) -> None:
    folder = run_folder(tmp_path, variant(study, name))
    outcome = execute(folder)
    assert outcome.status == "FINISHED", outcome.reason
    model, found = load_model(folder), losses(folder)
    assert backbone_checksum(model.backbone) == model.checksum == CHECKSUM
    assert len(model.adapter_parameters("default")) == TENSORS
    if name == "zero_shot":
        assert found[0] == found[1] == found[2]
        return
    assert sum(found[-1]) < sum(found[0])
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None and all("lora" in key or key == "backbone_sha256" for key in state["architecture"])


@pytest.mark.parametrize("name", ["er", "ewc", "gem", "ilora_code_intent"])
def test_a_head_at_targets_alone_trains_as_one_that_reads_all(
    data: Path, study: dict[str, Any], tmp_path: Path, name: str
) -> None:
    model = study["architecture"]
    found = []
    for places in ("all", "targets"):
        options = {"architecture": model | {"init_args": model["init_args"] | {"logits": places}}}
        folder = run_folder(tmp_path, variant(study | options, name), places)
        assert execute(folder).status == "FINISHED"
        found.append(losses(folder))
    assert found[1] == [pytest.approx(row, rel=1e-4) for row in found[0]]


def test_every_tensor_of_the_slow_adapter_follows_and_the_views_of_one_run_differ(
    data: Path, study: dict[str, Any], tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, variant(study, "ilora_paper"))
    assert execute(folder).status == "FINISHED"
    model = load_model(folder)
    assert model.adapter_names() == ["default", "slow"]
    fast, slow = (model.adapter_parameters(adapter) for adapter in ("default", "slow"))
    assert len(slow) == TENSORS and all(slow[name].any() for name in slow if name.endswith("lora_B"))
    assert not any(torch.equal(slow[name], fast[name]) for name in slow)
    last = {view: losses(folder, view)[-1] for view in ("default", "fast", "interpolated")}
    assert len({tuple(values) for values in last.values()}) == 3


def test_without_consistency_it_is_replay_on_the_real_model_too(
    data: Path, study: dict[str, Any], tmp_path: Path
) -> None:
    plain = variant(study, "ilora_code_intent")
    plain["variants"]["ilora_code_intent"]["strategies"]["ilora"]["init_args"] |= {"consistency": 0.0, "decay": 0.9}
    folders = [run_folder(tmp_path, data, name) for data, name in ((plain, "ilora"), (variant(study, "er"), "er"))]
    assert all(execute(folder).status == "FINISHED" for folder in folders)
    assert losses(folders[0]) == losses(folders[1])
