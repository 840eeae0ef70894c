"""The way of batches through Lightning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from studies import run_folder, study
from torch.nn import functional as F

from clplat.assembly import built_architecture, prepared_stream
from clplat.checkpoint import Checkpoints
from clplat.config import load_run
from clplat.execution import execute
from clplat.loaders import RowOrder


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_takes_the_steps_of_a_loop_written_out_by_hand(precision: str, tmp_path: Path) -> None:
    steps = 6
    data = study(
        stream__init_args={"num_tasks": 1}, architecture__init_args={"hidden_sizes": [32]},
        training__budget={"steps": steps}, training__precision=precision,
        training__optimizer={"class_path": "SGD", "init_args": {"lr": 0.5}},
    )  # fmt: skip
    folder = run_folder(tmp_path, data, "run")
    assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
    config = load_run(folder / "config.yaml")
    stream = prepared_stream(config)
    model, train = built_architecture(config, stream), stream.tasks[0].train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    order = RowOrder(len(train), batch_size=config.training.batch_size, seed=config.seed, task=0)
    for rows in order.batches(0, steps):
        batch = train.batch(rows)
        # What autocast has cast it keeps until it is left: a step must not see the weights of the one before.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(model(batch).logits, batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = Checkpoints(folder, every_seconds=0).load()
    assert trained is not None
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, trained["architecture"][name], atol=1e-6), name
