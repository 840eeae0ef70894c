"""Weights in double precision or bfloat16: trained, scored, saved and read again as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from studies import EWC, REPLAY, run_folder, study

from clplat.api import load_model
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import table
from clplat.precision import products

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
GROWING = {
    "class_path": "RecurrentHypernetwork",
    "init_args": {
        "target": {"class_path": "MLP", "init_args": {"hidden_sizes": [8]}}, "hidden_size": 8, "chunk_size": 200,
        "grow_by": 2,
    },
}  # fmt: skip


def images(precision: str, **changes: Any) -> dict[str, Any]:
    return study(training__precision=precision, strategies={"replay": REPLAY, "ewc": EWC}, **changes)


@pytest.mark.parametrize("precision", DTYPES)
def test_weights_are_in_the_precision_asked_for_and_stored_rows_as_the_stream_has_them(
    precision: str, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, images(precision))
    assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    assert {tensor.dtype for tensor in state["architecture"].values()} == {DTYPES[precision]}
    assert state["strategies"]["replay"]["state"]["buffer"]["rows"]["inputs"].dtype == torch.float32
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state["architecture"].items())


def test_double_precision_scores_every_task_as_single_precision_does(tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "64-true"):
        folder = run_folder(tmp_path, images(precision, architecture__init_args__dropout=0.0), precision)
        assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
        losses.append(torch.from_numpy(table(folder).matrix("loss")))
    assert torch.allclose(*losses, rtol=1e-3, atol=0, equal_nan=True)
    assert not torch.equal(losses[0].nan_to_num(), losses[1].nan_to_num())


@pytest.mark.parametrize("precision", DTYPES)
def test_what_grew_in_such_a_run_resumes_bit_for_bit(precision: str, tmp_path: Path) -> None:
    grown = study(training__precision=precision, architecture=GROWING)
    assert_resumes_as_if_never_stopped(grown, step=30, folder=tmp_path)


def test_float32_matrices_are_multiplied_as_the_run_says_whatever_the_process_had(tmp_path: Path) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for before in ("highest", "medium"):
        torch.set_float32_matmul_precision(before)
        try:
            for precision, device, expected in (
                ("tf32", gpu, "high"),
                ("tf32", cpu, "highest"),
                ("32-true", gpu, "highest"),
            ):
                with products(precision, device):
                    assert torch.get_float32_matmul_precision() == expected
                assert torch.get_float32_matmul_precision() == before
        finally:
            torch.set_float32_matmul_precision("highest")
    folders = [run_folder(tmp_path, images(precision), precision) for precision in ("32-true", "tf32")]
    assert all(execute(folder).status == "FINISHED" for folder in folders)
    np.testing.assert_array_equal(*(table(folder).matrix("loss") for folder in folders))
