"""Two processes that train one run keep equal strategies, and one buffer of what both have seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.strategies.buffers import Buffer
from clplat.strategies.toy_run import BATCH, STEPS, TASKS
from clplat.strategies.world import World
from clplat.streams.batch import Batch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("replica.py"))
    running = [subprocess.Popen([sys.executable, script, str(rank), "2", str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_processes_end_with_equal_strategies_weights_and_random_source(ranks: list[dict[str, Any]]) -> None:
    first, second = ({name: value for name, value in rank.items() if name != "mixed"} for rank in ranks)
    assert_equal(first, second)


def test_a_ring_with_a_reservoir_is_of_both_processes_rows_and_its_controller_decides_the_same_on_both(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["controlled"] for rank in ranks)
    assert first["decisions"] == second["decisions"]
    assert len({value for *_, knob, value in first["decisions"] if knob == "weight"}) > 3, "it steers"
    state = first["states"]["replay"]["buffer"]
    assert state["seen"] == 2 * TASKS * STEPS * BATCH and len(state["rows"]["inputs"]) == 9
    assert float(state["rises"][:, 1].sum()) > 2 * STEPS, "rows that either of them replayed were measured"


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_equal(left[name], right[name])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_equal(one, other)
    else:
        assert left == right


def test_the_buffer_was_offered_the_rows_of_both_processes_once(ranks: list[dict[str, Any]]) -> None:
    for state in ranks[0]["strategies"][:3]:
        assert state["buffer"]["seen"] == 2 * TASKS * STEPS * BATCH
        assert len(state["buffer"]["rows"]["inputs"]) == 9


def test_the_processes_train_on_different_rows_and_replay_different_rows(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["mixed"] for rank in ranks)
    assert first.shape == second.shape
    # Current rows are different ones; the first replay draws 2 rows a process out of 9 without repetition.
    for rows in (slice(0, BATCH), slice(BATCH, BATCH + 2)):
        assert len(torch.cat([first[rows], second[rows]]).unique(dim=0)) > len(first[rows].unique(dim=0))


def test_rows_of_both_processes_stay_in_a_reservoir_with_the_same_chance(ranks: list[dict[str, Any]]) -> None:
    counts, share = ranks[0]["times_kept"], 6 / 24
    assert counts.sum() == 600 * 6
    deviation = ((counts - 600 * share).square() / (600 * share * (1 - share))).sum() * 23 / 24
    assert 7.0 < deviation < 51.9, "chi-square with 23 degrees of freedom, two-sided 0.1 %"


def test_two_processes_keep_what_one_alone_would_have_kept(ranks: list[dict[str, Any]]) -> None:
    generator, counts = torch.Generator().manual_seed(5), torch.zeros(24)
    for _ in range(600):
        buffer = Buffer(capacity=6, policy="reservoir", generator=generator, world=World())
        for rows in torch.arange(24).split(8):
            buffer.add(Batch(inputs=rows, targets=rows))
        counts[buffer.batch().inputs] += 1
    assert torch.equal(ranks[0]["times_kept"], counts)


def test_truth_values_are_gathered_too(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["bools"].flatten().tolist() == [True, False, True, True]
