"""Class-incremental, domain-incremental and task-incremental sequences out of one labelled set of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from clplat.streams.base import EvalSet, Scenario, Spec, Task, TensorData
from clplat.streams.scorers import Classify

Labelled = tuple[Tensor, Tensor]
"""Inputs (N, ...) and class labels (N,) long."""


def class_groups(
    classes: list[int] | Literal["fixed", "seeded"],
    *,
    num_classes: int,
    num_tasks: int,
    order: Sequence[int] | None = None,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """The classes of each task: `classes` cut into `num_tasks` equal parts, which `order` then permutes.

    `classes` is a list (classes that are not named are left out), or 0, 1, 2, … (`fixed`), or these shuffled by the
    seed (`seeded`).
    """
    if classes == "seeded":
        classes = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    elif classes == "fixed":
        classes = list(range(num_classes))
    if len(set(classes)) != len(classes) or not all(0 <= int(label) < num_classes for label in classes):
        raise ValueError(f"class_order: name classes 0 to {num_classes - 1}, each at most once; got {classes}")
    if num_tasks < 1 or not classes or len(classes) % num_tasks:
        raise ValueError(f"num_tasks: {len(classes)} classes cannot be split into {num_tasks} equal tasks")
    size = len(classes) // num_tasks
    groups = [tuple(int(label) for label in classes[start : start + size]) for start in range(0, len(classes), size)]
    if order is None:
        return groups
    if sorted(order) != list(range(num_tasks)):
        raise ValueError(f"order: name the tasks 0 to {num_tasks - 1}, each once; got {list(order)}")
    return [groups[number] for number in order]


def split_tasks(
    *,
    train: Labelled,
    val: Labelled,
    test: Labelled,
    groups: Sequence[tuple[int, ...]],
    scenario: Scenario,
    data: Callable[..., TensorData] = TensorData,
    names: Sequence[str] | None = None,
) -> tuple[Spec, list[Task]]:
    """Tasks of the class groups, called `names` or after their classes, and the spec of the whole.

    In the `domain` scenario the targets are places within the group and all tasks share those outputs; in the
    others a class keeps its own output unit, numbered in the order of appearance. `data(inputs, targets, task=index)`
    makes a set of rows.
    """
    place = {label: (number if scenario == "domain" else number + start)
             for start, group in _with_starts(groups) for number, label in enumerate(group)}  # fmt: skip
    outputs = len(groups[0]) if scenario == "domain" else sum(map(len, groups))
    table = torch.zeros(max(place) + 1, dtype=torch.long)
    for label, unit in place.items():
        table[label] = unit
    tasks = []
    for index, group in enumerate(groups):
        shown = group if len(group) <= 4 else (group[0], "to", group[-1])
        name = names[index] if names else "classes-" + "-".join(map(str, shown))
        sets = {}
        for part, (inputs, labels) in {"train": train, "val": val, "test": test}.items():
            chosen = torch.isin(labels, torch.tensor(group))
            if part != "val" and not bool(chosen.any()):
                raise ValueError(f"task {name!r}: there are no {part} samples of the classes {list(group)}")
            sets[part] = data(inputs[chosen], table[labels[chosen]], task=index)
        tasks.append(labelled_task(index, name, classes=[place[label] for label in group], **sets))
    shape = tuple(train[0].shape[1:])
    return Spec(kind="classify", input_shape=shape, num_outputs=outputs, scenario=scenario), tasks


def labelled_task(
    index: int, name: str, *, train: TensorData, val: TensorData, test: TensorData, classes: Sequence[int]
) -> Task:
    """A classification task; without rows in `val` it has no validation set."""
    return Task(
        index=index, name=name, train=train,
        val=EvalSet(name=f"{name}/val", data=val, scorer=Classify()) if len(val) else None,
        test=EvalSet(name=name, data=test, scorer=Classify()),
        classes=tuple(classes), headline="accuracy",
    )  # fmt: skip


def stratified(labels: Tensor, *shares: float) -> list[Tensor]:
    """Row numbers of parts with the same share of every class: one part for each of `shares`, then the rest.

    Which row goes where follows from the labels (N,) alone, never from a run's seed.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts: list[list[Tensor]] = [[] for _ in range(len(shares) + 1)]
    for label in labels.unique():
        mine = order[labels[order] == label]
        ends = [round(len(mine) * share) for share in accumulate(shares)]
        for part, rows in zip(parts, mine.tensor_split(ends), strict=True):
            part.append(rows)
    return [torch.cat(part) for part in parts]


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Row numbers of the first `count` samples of every class, in the order of the rows."""
    order = labels.argsort(stable=True)
    rank = torch.arange(len(labels)) - torch.searchsorted(labels[order], labels[order])
    return order[rank < count].sort().values


def _with_starts(groups: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    return [(sum(len(earlier) for earlier in groups[:number]), group) for number, group in enumerate(groups)]
