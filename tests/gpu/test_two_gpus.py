"""Two GPUs train what one does: equal weights, buffers and scores on both, with whole weights and with shared ones.

pytest tests/gpu/test_two_gpus.py -x
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_component import SMALL, part, text
from group_runs import ended
from shared_buffers import CASES, seen, together
from studies import assert_same

from clplat.strategies.world import World, packed

STRATEGIES: dict[str, dict[str, Any]] = {
    "naive": {},
    "er": {"own": part("ExperienceReplay", capacity=20, from_task=1)},
    "derpp": {"own": part("DERpp", capacity=20, top_logits=4)},
    "ewc": {"own": part("EWC", strength=5.0, fisher_samples=8)},
}
TRC2 = {
    "hidden_size": 32, "num_layers": 3, "dropout": 0.0, "write": {"chunk": 4, "quota": 6},
    "column": {"num_heads": 4, "inner_size": 16, "num_experts": 4, "balance": 0.0},
    "hippocampus": {"slots": 12, "k_read": 3},
}  # fmt: skip


def cases() -> dict[str, dict[str, Any]]:
    changes = {"training__clip_norm": 1.0}
    found = {name: text(part("Transformer", **SMALL), strategies=own, **changes) for name, own in STRATEGIES.items()}
    found["trc2"] = text(part("TRC2", **TRC2), strategies=STRATEGIES["er"], **changes)
    for data in found.values():
        # Adam would make large steps of the last bits of small gradients.
        data["training"]["optimizer"] = part("SGD", lr=0.1)
        # As many targets in all rows: each process takes the mean over its own.
        data["stream"]["init_args"] |= {"pairs": [2, 2], "rewritten": [0, 1]}
    shared = {f"{name}-shared": {**found[name], "training": found[name]["training"] | {"sharding": "fsdp"}}
              for name in STRATEGIES}  # fmt: skip
    return found | shared


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    whole = {name: data for name, data in cases().items() if not name.endswith("-shared")}
    return ended(one, whole, 1, "gpu")[0], ended(two, cases(), 2, "gpu")


@pytest.mark.parametrize("name", cases())
def test_both_gpus_end_alike_and_as_one_does(runs: tuple[dict[str, Any], list[dict[str, Any]]], name: str) -> None:
    alone, (first, second) = runs[0][name.removesuffix("-shared")], (rank[name] for rank in runs[1])
    for key in ("rows", "weights", "buffers", "strategies", "random"):
        assert_same(first[key], second[key], key)
    for weight, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][weight], value, rtol=1e-3, atol=1e-4, msg=weight)
    for ours, theirs in ((first["last"], first["alone"]), (first["last"], alone["last"])):
        assert [c["value"] for c in ours] == pytest.approx(
            [c["value"] for c in theirs], rel=1e-3, abs=1e-3, nan_ok=True
        )


@pytest.mark.parametrize("case", CASES)
def test_a_buffer_that_two_gpus_share_is_that_of_one_process_and_no_step_of_a_reservoir_waits(
    case: str, shared: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    alone, both = shared[0][case], [rank[case] for rank in shared[1]]
    for rank, record in enumerate(both):
        for ours, theirs in zip(record["draws"], alone["draws"], strict=True):
            for name, tensor in theirs.items():
                assert torch.equal(packed({"": ours[name]}), packed({"": tensor[rank::2].contiguous()})), name
        for name, tensor in alone["end"]["state"]["rows"].items():
            assert torch.equal(packed({"": record["end"]["state"]["rows"][name]}), packed({"": tensor})), name
        assert torch.equal(record["end"]["state"]["rises"], alone["end"]["state"]["rises"])
    assert sum(record["held"] for record in both) == alone["held"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder, alone = (
        tmp_path_factory.mktemp("shared"),
        {case: seen(case, World(), torch.device("cpu")) for case in CASES},
    )
    torch.save({case: record["middle"] for case, record in alone.items()}, folder / "middle.pt")
    return alone, together(folder, [2], "gpu")[2]


def test_replay_holds_the_budget_of_the_whole_run(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    assert [rank[name]["replay"] for rank in runs[1] for name in ("er", "derpp", "trc2")] == [[20]] * 6
