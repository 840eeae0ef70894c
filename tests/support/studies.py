"""Small studies that several tests run: complete, but over in a second."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from clplat.checkpoint import Checkpoints
from clplat.config import save
from clplat.journal import read
from clplat.study_file import expand, load_study

DIGITS: dict[str, Any] = {
    "name": "digits",
    "stream": {"class_path": "SplitDigits", "init_args": {"num_tasks": 3, "class_order": [0, 1, 2, 3, 4, 5]}},
    "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [32], "dropout": 0.1}},
    "training": {
        "budget": {"steps": 12},
        "batch_size": 16,
        "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    },
    "checkpoint": {"every_seconds": 0},
    "tracking": {"enabled": False, "log_every": 5, "system_metrics": False},
}

PARITY: dict[str, Any] = {
    "name": "parity",
    "stream": {"class_path": "NParity", "init_args": {"last": 3, "train_rows": 640, "val_rows": 20, "test_rows": 20}},
    "architecture": {"class_path": "LeakyRNN", "init_args": {"hidden_size": 16}},
    "training": {
        "budget": {"steps": 5},
        "batch_size": 64,
        "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.05}},
    },
} | {key: DIGITS[key] for key in ("checkpoint", "tracking")}

REPLAY = {"class_path": "ExperienceReplay", "init_args": {"capacity": 40}}
EWC = {"class_path": "OnlineEWC", "init_args": {"strength": 10.0}}


def study(**changes: Any) -> dict[str, Any]:
    """The digits study with top-level keys, or keys written `a__b`, changed."""
    return _changed(DIGITS, changes)


def parity(**changes: Any) -> dict[str, Any]:
    """The parity study, changed in the same way."""
    return _changed(PARITY, changes)


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(base)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = data
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return data


def run_folder(parent: Path, data: dict[str, Any], name: str = "run") -> Path:
    """A run folder for the first run of a study, ready to be executed."""
    folder = parent / name
    folder.mkdir(parents=True)
    save(expand(load_study(data))[0], folder / "config.yaml")
    return folder


def everything(folder: Path) -> dict[str, Any]:
    """All of a run that must not depend on interruptions."""
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    timed = ("cost/", "system/")
    points = [
        (key, entry["step"], value)
        for entry in read(folder)
        if entry["kind"] == "metric"
        for key, value in entry["values"].items()
        if not key.startswith(timed)
    ]
    kept = {key: state[key] for key in ("architecture", "strategies", "table", "global_steps", "strategy_random")}
    return kept | {"points": sorted(points), "steps": state["costs"]["steps"], "rows": state["costs"]["rows_replay"]}


def assert_same(left: Any, right: Any, place: str = "") -> None:
    """Bitwise equality of nested tensors and plain data; NaN equals NaN."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{place}[{number}]")
    elif isinstance(left, torch.Tensor):
        assert left.shape == right.shape and left.dtype == right.dtype, place
        assert bool(((left == right) | ((left != left) & (right != right))).all()), place
    else:
        assert left == right or (left != left and right != right), f"{place}: {left} != {right}"
