"""The same study on Avalanche's SplitMNIST and on ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import clplat
from clplat.journal import table


def test_avalanches_split_mnist_has_the_accuracies_of_ours(data: Path, tmp_path: Path) -> None:
    ours = {"class_path": "SplitMNIST", "init_args": {"root": "${CLPLAT_DATA}/mnist"}}
    arguments = {"n_experiences": 5, "dataset_root": "${CLPLAT_DATA}/mnist", "fixed_class_order": list(range(10))}
    theirs = {"class_path": "AvalancheStream", "init_args": {"benchmark": "SplitMNIST", "arguments": arguments}}
    study: dict[str, Any] = {
        "name": "both",
        "stream": ours,
        "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [64]}},
        # All rows in every step: Avalanche's rows stand in another order within a task.
        "training": {
            "budget": {"steps": 15}, "batch_size": 20_000,
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}},
        },
        "variants": {"ours": {}, "theirs": {"stream": theirs}},
        "tracking": {"enabled": False},
        "launcher": {"workers": 1},
        "evaluation": {"batch_size": 1000},
    }  # fmt: skip
    done = clplat.run(study, quiet=True)
    assert done.code == 0
    scores = [table(done.folder / f"{name}-s0").scores() for name in ("ours", "theirs")]
    # Pixels and sums differ by float rounding; one sample in a thousand may fall on the other side.
    assert scores[0] == pytest.approx(scores[1], abs=2e-3, nan_ok=True)
    assert all(scores[0][task + 1, task] > 0.9 for task in range(5))
