"""Two processes that train adapters, memories or prompts in a real run are the same experiment as one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from question_runs import run_of
from studies import run_folder

from clplat.checkpoint import Checkpoints
from clplat.execution import execute

ARMS: dict[str, dict[str, Any]] = {
    "ilora": {"class_path": "ILoRA", "init_args": {"capacity": 12, "decay": 0.5}},
    "olora": {"class_path": "OLoRA", "init_args": {"norm": 0.1}},
    "one": {"class_path": "AdapterPerTask"},
    "progressive": {"class_path": "ProgressivePrompts", "init_args": {"length": 3}},
    "pool": {"class_path": "PromptPool", "init_args": {"size": 4, "length": 2, "top_k": 2, "query_tokens": 3}},
    "locas": {"class_path": "Locas", "init_args": {"after_task": "stack"}},
}


def architecture(arm: str, model: Path) -> dict[str, Any]:
    whole = {"class_path": "Pretrained", "init_args": {"name": str(model)}}
    if arm == "locas":
        return {"class_path": "LocasModel", "init_args": {"model": whole, "memory": {"rank": 4}}}
    if arm in ("progressive", "pool"):
        return {"class_path": "Prompted", "init_args": {"name": str(model)}}
    return {"class_path": "Pretrained", "init_args": {"name": str(model), "lora": {"rank": 4, "dropout": 0.0}}}


def tasks_of(root: Path) -> Path:
    """Answers of one length: each process takes the mean over its own rows' tokens."""
    for name, plus in (("plus", 1), ("minus", 0)):
        (root / name).mkdir(parents=True)
        rows = [{"prompt": f"{a} {b}=", "answer": f"{a + plus * b:02d}"} for a in range(9) for b in range(9)]
        for part, chosen in (("train", rows[::2]), ("test", rows[3::4])):
            (root / name / f"{part}.json").write_text(json.dumps(chosen))
    return root


@pytest.mark.long
@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_give_the_weights_of_one(places: tuple[Path, Path], tmp_path: Path, arm: str) -> None:
    data = run_of(
        (tasks_of(tmp_path / "tasks"), places[1]),
        tmp_path / "cache",
        architecture=architecture(arm, places[1]),
        strategies={"arm": ARMS[arm]},
    )
    data["stream"]["init_args"]["max_answers"] = 0
    data["training"] |= {"budget": {"steps": 3}, "accelerator": "cpu"}
    states = []
    for devices in (1, 2):
        data["training"]["devices"] = devices
        folder = run_folder(tmp_path, data, f"of{devices}")
        outcome = execute(folder)
        assert outcome.status == "FINISHED", outcome.reason
        states.append(Checkpoints(folder, every_seconds=0).load())
    one, both = states
    assert one is not None and both is not None and one["architecture"].keys() == both["architecture"].keys()
    for name, weight in one["architecture"].items():
        torch.testing.assert_close(
            both["architecture"][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
        )
