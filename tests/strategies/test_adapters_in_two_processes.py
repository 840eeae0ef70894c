"""Two processes that train adapters, memories or prompts together end with the same ones, from different rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_toys import toy_folder
from studies import assert_same

ARMS = ("I-LoRA", "I-LoRA as meant", "O-LoRA", "adapter per task", "LwF", "progressive prompts", "prompt pool", "Locas",
        "Locas stacked")  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [str(folder), str(toy_folder(folder)), str(Path(__file__).parents[1] / "support")]
    script = str(Path(__file__).with_name("adapter_replica.py"))
    running = [subprocess.Popen([sys.executable, script, str(rank), "2", *command]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("arm", ARMS)
def test_both_end_with_equal_weights_strategies_and_random_sources(ranks: list[dict[str, Any]], arm: str) -> None:
    first, second = (dict(rank[arm]) for rank in ranks)
    assert not torch.equal(first.pop("rows"), second.pop("rows")), "they train on different rows"
    assert_same(first, second, arm)
