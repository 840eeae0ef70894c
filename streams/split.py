"""Class-incremental, domain-incremental and task-incremental sequences out of one labelled set of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clplat.streams.base import EvalSet, Scenario, Spec, Task, TensorData
from clplat.streams.scorers import Classify

Labelled = tuple[Tensor, Tensor]
"""Inputs (N, ...) and class labels (N,) long."""


def class_groups(num_classes: int, num_tasks: int, order: Sequence[int]) -> list[tuple[int, ...]]:
    """The classes of each task: `order` cut into `num_tasks` equal parts."""
    if num_tasks < 1 or len(order) % num_tasks:
        raise ValueError(f"num_tasks: {len(order)} classes cannot be split into {num_tasks} equal tasks")
    if len(set(order)) != len(order) or not all(0 <= label < num_classes for label in order):
        raise ValueError(f"class_order: name classes 0 to {num_classes - 1}, each at most once; got {list(order)}")
    size = len(order) // num_tasks
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def class_order(option: list[int] | str, num_classes: int, seed: int) -> list[int]:
    """The order in which classes appear: as listed, 0, 1, 2, … (`fixed`), or shuffled by the seed (`seeded`)."""
    if isinstance(option, list):
        return option
    if option == "seeded":
        return torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    return list(range(num_classes))


def split_tasks(
    *, train: Labelled, val: Labelled, test: Labelled, groups: Sequence[tuple[int, ...]], scenario: Scenario
) -> tuple[Spec, list[Task]]:
    """Tasks of the class groups, and the spec of the whole.

    In the `domain` scenario the targets are places within the group and all tasks share those outputs; in the
    others a class keeps its own output unit, numbered in the order of appearance.
    """
    place = {label: (number if scenario == "domain" else number + start)
             for start, group in _with_starts(groups) for number, label in enumerate(group)}  # fmt: skip
    outputs = len(groups[0]) if scenario == "domain" else sum(map(len, groups))
    table = torch.zeros(max(place) + 1, dtype=torch.long)
    for label, unit in place.items():
        table[label] = unit
    tasks = []
    for index, group in enumerate(groups):
        name = "classes-" + "-".join(map(str, group if len(group) <= 4 else (group[0], "to", group[-1])))
        sets = {}
        for part, (inputs, labels) in {"train": train, "val": val, "test": test}.items():
            chosen = torch.isin(labels, torch.tensor(group))
            if part != "val" and not bool(chosen.any()):
                raise ValueError(f"task {name!r}: there are no {part} samples of the classes {list(group)}")
            sets[part] = TensorData(inputs[chosen], table[labels[chosen]], task=index)
        val_set = EvalSet(name=f"{name}/val", data=sets["val"], scorer=Classify()) if len(sets["val"]) else None
        tasks.append(
            Task(
                index=index, name=name, train=sets["train"], val=val_set,
                test=EvalSet(name=name, data=sets["test"], scorer=Classify()),
                classes=tuple(place[label] for label in group), headline="accuracy",
            )
        )  # fmt: skip
    shape = tuple(train[0].shape[1:])
    return Spec(kind="classify", input_shape=shape, num_outputs=outputs, scenario=scenario), tasks


def _with_starts(groups: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    return [(sum(len(earlier) for earlier in groups[:number]), group) for number, group in enumerate(groups)]
