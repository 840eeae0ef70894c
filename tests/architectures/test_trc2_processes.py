"""Two processes that train one TRC² hold one store, bit for bit, and it is the store of one process alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import trc2_replica
from trc2_replica import SETTINGS, trained


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = str(trc2_replica.__file__)
    running = [subprocess.Popen([sys.executable, script, str(rank), "2", str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", SETTINGS)
def test_both_processes_end_with_equal_weights_store_and_critics(ranks, kind: str) -> None:
    first, second = (rank[kind] for rank in ranks)
    assert first["store.used"].any()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", SETTINGS)
def test_and_with_those_of_one_process_that_saw_every_row(ranks, kind: str) -> None:
    for name, value in trained(0, 1, SETTINGS[kind]).items():
        torch.testing.assert_close(ranks[0][kind][name], value, rtol=1e-6, atol=1e-9, msg=name)
