"""Diagnostic studies end to end: shipped files are sound, longer rows are probes, a tiny model learns recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from studies import DIGITS, run_folder

from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.result_table import ResultTable
from clplat.strategies.world import World
from clplat.streams.batch import IGNORE
from clplat.study_file import expand, load_study

STUDIES = ("mqar", "mqar_overwrite", "single_needle", "formal_languages")
FEW = [("seeds", "[0]"), *((f"stream.init_args.{part}_rows", "600") for part in ("train", "val", "test"))]


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_of_the_shipped_studies_can_be_built_and_reads_its_longest_rows(name: str) -> None:
    runs = expand(load_study(f"diagnostics/{name}", FEW))
    assert len({run.variant for run in runs}) == len(runs) >= 5
    for run in runs:
        parts = assemble(run, World())
        tests = [*(task.test for task in parts.stream.tasks), *parts.stream.probes]
        longest = max(tests, key=lambda test: test.data.batch(torch.arange(1)).inputs.shape[1])
        batch = longest.data.batch(torch.arange(2))
        logits = parts.architecture(batch).logits
        assert logits.shape == (*batch.inputs.shape, parts.stream.spec.num_outputs)
        assert int(batch.targets.max()) < parts.stream.spec.num_outputs


SMALL_STUDY: dict[str, Any] = {
    "name": "recall",
    "stream": {
        "class_path": "MQAR",
        "init_args": {"pairs": [2, 4], "rewritten": [1], "lengths": [16, 24], "vocab_size": 32, "multiples": [2],
                      "train_rows": 200, "val_rows": 20, "test_rows": 40},
    },
    "architecture": {"class_path": "Transformer", "init_args": {"hidden_size": 16, "num_layers": 1, "num_heads": 1}},
    "training": {
        "budget": {"steps": 3}, "batch_size": 8, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
    },
    "strategies": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 20}}},
} | {key: DIGITS[key] for key in ("checkpoint", "tracking")}  # fmt: skip


def test_a_study_replays_shorter_rows_and_records_longer_ones_as_probes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, SMALL_STUDY)
    assert execute(folder).status == "FINISHED"
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    rows = ResultTable.from_state(state["table"]).to_rows()
    cells = {(cell["row"], cell["task"], cell["index"], cell["metric"]): cell["value"] for cell in rows}
    metrics = {"accuracy", "loss", "row_accuracy", "rewritten_accuracy", "stale_rate"}
    tasks = ("2-pairs-1-rewritten-16", "4-pairs-1-rewritten-24")
    expected = {(task, index) for index, task in enumerate(tasks)} | {(f"{task}-x2", None) for task in tasks}
    assert cells.keys() == {(row, *place, metric) for row in range(3) for place in expected for metric in metrics}
    assert all(0 <= value <= 1 for (*_, metric), value in cells.items() if metric != "loss")


def test_a_tiny_transformer_learns_recall_of_four_pairs() -> None:
    data = SMALL_STUDY | {"strategies": {}}
    stream = {"pairs": [4], "rewritten": [0], "lengths": [16], "multiples": [], "power": 1.0, "train_rows": 10_000}
    data |= {"stream": {"class_path": "MQAR", "init_args": SMALL_STUDY["stream"]["init_args"] | stream}}
    network = {"hidden_size": 32, "num_layers": 2, "num_heads": 1, "tie_head": False, "initial_std": 0.06}
    data |= {"architecture": {"class_path": "Transformer", "init_args": network}}
    parts = assemble(expand(load_study(data))[0], World())
    task, model = parts.stream.tasks[0], parts.architecture
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = torch.Generator().manual_seed(0)
    for _ in range(150):
        batch = task.train.batch(torch.randint(len(task.train), (64,), generator=chance))
        logits = model(batch).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (accuracy,) = (
        cell.value for cell in parts.evaluator.cells([0]) if cell.metric == "accuracy" and cell.task == task.name
    )
    assert accuracy > 0.95, "four values a row: 0.25 for a model that knows them without their keys"
