"""Image streams."""

from __future__ import annotations

from typing import Literal

import torch

from clplat.streams.base import Scenario, Stream
from clplat.streams.split import Labelled, class_groups, split_tasks


class SplitDigits(Stream):
    """Handwritten digits in groups of classes: 1,797 real 8×8 images that come with scikit-learn."""

    paper = "Alpaydin & Kaynak 1998 (UCI optical digits)"

    def __init__(
        self,
        *,
        scenario: Scenario = "class",
        num_tasks: int = 5,
        class_order: list[int] | Literal["fixed", "seeded"] = "fixed",
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
        parts = _stratified(inputs, torch.tensor(labels, dtype=torch.long), self.fractions)
        self.spec, self.tasks = split_tasks(**parts, groups=self.groups, scenario=self.scenario)


def _stratified(inputs: torch.Tensor, labels: torch.Tensor, fractions: tuple[float, float]) -> dict[str, Labelled]:
    """Test, validation and training samples with the same share of every class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen: dict[str, list[torch.Tensor]] = {"test": [], "val": [], "train": []}
    for label in labels.unique():
        mine = order[labels[order] == label]
        ends = [round(len(mine) * fractions[0]), round(len(mine) * sum(fractions))]
        for part, rows in zip(chosen, mine.tensor_split(ends), strict=True):
            chosen[part].append(rows)
    rows = {part: torch.cat(pieces) for part, pieces in chosen.items()}
    return {part: (inputs[index], labels[index]) for part, index in rows.items()}
