"""A buffer that several processes share is that of one alone, bit for bit, and each of them holds its share of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_buffers import CAPACITY, CASES, MIDDLE, ROW_BYTES, STEPS, means, new_buffer, seen, taken_through, together
from torch import Tensor

from clplat.strategies.world import World, packed, unpacked

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {case: seen(case, World(), CPU) for case in CASES}


@pytest.fixture(scope="module")
def groups(
    alone: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("groups")
    torch.save({case: record["middle"] for case, record in alone.items()}, folder / "middle.pt")
    return together(folder, (3, 2))


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest, groups: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return groups[request.param]


def assert_equal_bits(ours: Any, theirs: Any, name: str = "") -> None:
    if isinstance(theirs, Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert torch.equal(packed({"": ours.reshape(-1, 1)}), packed({"": theirs.reshape(-1, 1)})), name
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), name
        for key, value in theirs.items():
            assert_equal_bits(ours[key], value, f"{name} {key}")
    else:
        assert ours == theirs, name


@pytest.mark.parametrize("case", CASES)
def test_the_rows_drawn_are_those_of_one_process_dealt_out_bit_for_bit(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], case: str
) -> None:
    draws = alone[case]["draws"]
    assert len(draws) == STEPS * (1 if case.startswith("ring_reservoir") else 2)
    assert any(bool(draw["inputs"].isnan().any()) for draw in draws)
    for rank, record in enumerate(ranks):
        assert len(record[case]["draws"]) == len(draws)
        for ours, theirs in zip(record[case]["draws"], draws, strict=True):
            assert_equal_bits(ours, {name: tensor[rank :: len(ranks)] for name, tensor in theirs.items()})


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_as_a_whole_and_saved_is_that_of_one_process_on_each(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], case: str
) -> None:
    keys = ("middle", "end", "whole", "in_parts", "part", "every_third", "none", "data", "nbytes", "rows")
    assert alone[case]["rows"] == CAPACITY and len(alone[case]["part"]["inputs"]) == 7
    assert bool(alone[case]["end"]["state"]["rises"].any()) == case.endswith("tracked")
    for record in ranks:
        for key in keys:
            assert_equal_bits(record[case][key], alone[case][key], key)


@pytest.mark.parametrize("case", CASES)
def test_a_share_of_consecutive_rows_is_every_so_many_th_of_them(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], case: str
) -> None:
    for rank, record in enumerate(ranks):
        for ours, theirs in zip(record[case]["shares"], alone[case]["shares"], strict=True):
            assert_equal_bits(ours, {name: tensor[rank :: len(ranks)] for name, tensor in theirs.items()})


@pytest.mark.parametrize("case", CASES)
def test_all_hold_the_budget_together_and_each_its_share(ranks: list[dict[str, Any]], case: str) -> None:
    held = [record[case]["held"] for record in ranks]
    assert sum(held) == CAPACITY * ROW_BYTES
    assert max(held) == -(-CAPACITY // len(ranks)) * ROW_BYTES
    lowest_loss = 4 if CASES[case][1] else 0
    assert {record[case]["nbytes"] for record in ranks} == {CAPACITY * (ROW_BYTES + lowest_loss)}


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_from_what_several_have_saved(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], case: str
) -> None:
    # Several have gone on from what one had saved, and that is what `seen` gives.
    buffer, saved = new_buffer(case, World()), ranks[-1][case]["middle"]
    buffer.load_state_dict(saved["state"], CPU)
    buffer.generator.set_state(saved["random"])
    taken_through(buffer, range(MIDDLE, STEPS), CPU)
    assert_equal_bits(buffer.state_dict(), alone[case]["end"]["state"])


def test_the_nearest_means_of_shared_rows_are_those_of_one_process_also_where_one_has_nothing_to_answer(
    ranks: list[dict[str, Any]],
) -> None:
    expected = dict(enumerate(means(World())))
    for record in ranks:
        assert_equal_bits(dict(enumerate(record["means"])), expected)


def test_rows_of_every_type_are_packed_into_bytes_and_unpacked_bit_for_bit() -> None:
    fields = {
        "bool": torch.tensor([True, False]), "small": torch.tensor([[-1], [7]], dtype=torch.int8),
        "single": torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-45]]), "empty": torch.zeros(2, 0),
        "complex": torch.tensor([1 - 2j, 3j]), "wide": torch.tensor([[[2**62]], [[-1]]]),
    }  # fmt: skip
    bytes_of = packed(fields)
    assert bytes_of.shape == (2, 1 + 1 + 8 + 8 + 8) and bytes_of.dtype == torch.uint8
    for count in (2, 1, 0):
        back = unpacked(bytes_of[:count], fields)
        for name, tensor in fields.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor[:count].shape
            assert torch.equal(packed({"": back[name]}), packed({"": tensor[:count]})), name
