"""Image sets of which few-shot streams are dealt: every class with rows to train on and rows to score on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clplat.streams.base import TensorData
from clplat.streams.image_files import decoded
from clplat.streams.images import CIFAR10, ImageSet, cifar10_in_parquet
from clplat.streams.split import Labelled, stratified


@dataclass(frozen=True, kw_only=True)
class Pool:
    """All classes of a set, numbered from 0. `groups` names each class's group: its alphabet, or its own number.

    `data(inputs, targets, task=index)` makes a set of rows.
    """

    train: Labelled
    test: Labelled
    groups: list[str]
    data: Callable[..., TensorData]


def digits(root: Path, test_fraction: float | None, side: int | None) -> Pool:
    """scikit-learn's 1,797 handwritten digits of 8×8; needs no files."""
    from sklearn.datasets import load_digits

    _as_it_is(side, "digits")
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return _divided(inputs, torch.tensor(labels, dtype=torch.long), test_fraction, _numbers(10), TensorData)


def omniglot(root: Path, test_fraction: float | None, side: int | None) -> Pool:
    """Handwritten characters, 20 drawers of each: the parquet files in `root` with image, label and alphabet.

    Images are grey, `side` pixels high and wide, 28 unless told as in Vinyals et al. 2016 (arXiv:1606.04080, §4.1.1),
    with ink 1 on 0.
    """
    files = sorted(root.glob("*.parquet"))
    if not files:
        raise ValueError(f"root: there is no parquet file in {root}; name the folder of Omniglot's (docs/data.md)")
    side = 28 if side is None else side
    images, labels = decoded(files, ("L", side))
    alphabets = _column(files, "alphabet")
    classes, first = np.unique(labels.numpy(), return_index=True)
    ink = ImageSet(shape=(1, side, side), num_classes=len(classes), mean=(0.0,), std=(1.0,), readers={})
    numbered = torch.searchsorted(torch.from_numpy(classes), labels)
    return _divided(255 - images, numbered, test_fraction, [alphabets[row] for row in first], ink.data)


def cifar10(root: Path, test_fraction: float | None, side: int | None) -> Pool:
    """CIFAR-10 from train and test parquet files in `root`; its own test part is scored."""
    if test_fraction is not None:
        raise ValueError("test_fraction: cifar10 has a test part of its own; leave it out")
    _as_it_is(side, "cifar10")
    train, test = cifar10_in_parquet(root)
    return Pool(train=train, test=test, groups=_numbers(10), data=CIFAR10.data)


READERS = {"omniglot": omniglot, "digits": digits, "cifar10": cifar10}


def _as_it_is(side: int | None, source: str) -> None:
    if side is not None:
        raise ValueError(f"side: {source} comes in one size; leave it out")


def _divided(
    inputs: Tensor, labels: Tensor, test_fraction: float | None, groups: list[str], data: Callable[..., TensorData]
) -> Pool:
    """A set without a test part of its own: a share of each class, a quarter unless told, the same for every seed."""
    test, train = stratified(labels, 0.25 if test_fraction is None else test_fraction)
    return Pool(train=(inputs[train], labels[train]), test=(inputs[test], labels[test]), groups=groups, data=data)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _column(files: list[Path], name: str) -> list[str]:
    import pyarrow.parquet as pq

    values: list[str] = []
    for file in files:
        table = pq.read_table(file, columns=[name])
        if name not in table.column_names:
            raise ValueError(f"{file}: needs the column {name}, which names each image's alphabet")
        values += table.column(name).to_pylist()
    return values
