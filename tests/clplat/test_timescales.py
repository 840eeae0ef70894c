"""The timescales study end to end: which heads a task moves, what several questions cost, what is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from studies import parity, run_folder

from clplat.architectures.base import Output
from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import last_status, read
from clplat.objective import Objective
from clplat.strategies.world import World
from clplat.streams.base import Spec
from clplat.streams.batch import CURRENT, IGNORE, REPLAY, Batch
from clplat.study_file import expand, load_study


def varied(stream: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Three tasks, weights kept after each."""
    options = {f"stream__init_args__{name}": value for name, value in ({"last": 4} | stream).items()}
    return parity(**options, checkpoint={"every_seconds": 1e9, "snapshots": "boundary"}, **changes)


def heads_after_each_task(folder: Path) -> list[torch.Tensor]:
    """Weights (heads, 2, H) after each task."""
    files = sorted((folder / "snapshots").glob("*.pt"))
    states = [torch.load(file, weights_only=True)["architecture"] for file in files]
    return [state["head.weight"].view(-1, 2, 16) for state in states]


@pytest.mark.parametrize(
    ("stream", "moved"),
    [
        ({"curriculum": "multi_head"}, [[0, 1], [0, 1, 2]]),
        ({"curriculum": "sliding", "window": 2}, [[0, 1], [1, 2]]),
        ({"curriculum": "sliding", "window": 1}, [[1], [2]]),
        ({"curriculum": "single_head"}, [[0], [0]]),
    ],
)
def test_a_task_moves_the_heads_that_its_curriculum_trains_and_no_other(
    tmp_path: Path, stream: dict[str, Any], moved: list[list[int]]
) -> None:
    folder = run_folder(tmp_path, varied(stream))
    assert execute(folder).status == "FINISHED"
    after = heads_after_each_task(folder)
    assert len(after[0]) == (1 if stream["curriculum"] == "single_head" else 3)
    changed = [(now != before).any(2).any(1).nonzero().flatten().tolist() for before, now in zip(after, after[1:])]
    assert changed == moved


def test_losses_of_several_questions_add_up_and_unasked_ones_count_nothing() -> None:
    spec = Spec(kind="classify", input_shape=(4,), num_outputs=2, scenario="domain", heads=3)
    objective = Objective(spec, [])
    logits = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 0, IGNORE], [0, 0, IGNORE], [1, 1, IGNORE], [0, 1, IGNORE]])
    batch = Batch(inputs=torch.zeros(4, 4), targets=targets)
    found = objective(Output(logits=logits), batch)
    assert torch.allclose(found, sum(F.cross_entropy(logits[:, head], targets[:, head]) for head in (0, 1)))
    mixed = batch.rows(slice(0, 2)).with_origin(CURRENT).joined(batch.rows(slice(2, 4)).with_origin(REPLAY, 0.5))
    parts = objective.by_origin(Output(logits=logits), mixed)
    expected = [
        weight * sum(F.cross_entropy(logits[part, head], targets[part, head]) for head in (0, 1))
        for part, weight in ((slice(0, 2), 1.0), (slice(2, 4), 0.5))
    ]
    assert torch.allclose(parts, torch.stack(expected))


def test_tau_and_network_timescales_are_in_the_journal_at_every_boundary(tmp_path: Path) -> None:
    architecture = {"class_path": "LeakyRNN", "init_args": {"hidden_size": 16, "measured_steps": 2000}}
    folder = run_folder(tmp_path, varied({}, architecture=architecture))
    assert execute(folder).status == "FINISHED"
    points = [
        (e["step"], e["values"]) for e in read(folder) if e["kind"] == "metric" and "model/tau_mean" in e["values"]
    ]
    assert [step for step, _ in points] == [0, 5, 10, 15]
    assert all(
        values.keys() >= {"model/tau_median", "model/tau_net_mean", "model/tau_net_median"} for _, values in points
    )
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    assert points[-1][1]["model/tau_mean"] == float(state["architecture"]["tau"].mean())
    assert len({values["model/tau_mean"] for _, values in points}) == 4


STRATEGIES = {
    "er": {"class_path": "ExperienceReplay", "init_args": {"capacity": 20}},
    "ewc": {"class_path": "OnlineEWC", "init_args": {"strength": 1.0}},
    "cumulative": {"class_path": "Cumulative", "init_args": {}},
    "lwf": {"class_path": "LwF", "init_args": {}},
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("curriculum", ["single_head", "multi_head"])
def test_strategies_against_forgetting_work_on_both_curricula(
    tmp_path: Path, strategy: dict[str, Any], curriculum: str
) -> None:
    folder = run_folder(tmp_path, varied({"curriculum": curriculum}, strategies={"one": strategy}))
    assert execute(folder).status == "FINISHED"
    assert last_status(folder) == "FINISHED"


@pytest.mark.parametrize("name", ["timescales_parity", "timescales_dms"])
def test_every_variant_of_the_shipped_studies_can_be_built(name: str) -> None:
    runs = expand(load_study(f"benchmarks/{name}", [("seeds", "[0]"), ("stream.init_args.train_rows", "200")]))
    assert len({run.variant for run in runs}) == len(runs) >= 6
    for run in runs:
        parts = assemble(run, World())
        logits = parts.architecture(parts.stream.tasks[-1].train.batch(torch.arange(3))).logits
        heads = parts.stream.spec.heads
        assert logits.shape == ((3, 2) if heads is None else (3, heads, 2))
