"""Avalanche's benchmarks as streams: every experience becomes a task.

    stream:
      class_path: AvalancheStream
      init_args: {benchmark: SplitMNIST, arguments: {n_experiences: 5, dataset_root: "${CLPLAT_DATA}/mnist"}}

Importing Avalanche takes seconds, so it happens when a stream is prepared and not before.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.streams.base import EvalSet, Scenario, Spec, Stream, Task, TensorData
from clplat.streams.scorers import Classify

CLASSIC = "avalanche.benchmarks.classic"

Rows = tuple[Tensor, Tensor, Tensor]
"""Inputs (N, ...), class labels (N,) and task labels (N,), both long."""


class AvalancheStream(Stream):
    """Any Avalanche benchmark: one task for each experience, its images read once, with the evaluation transforms."""

    paper = "Carta et al. 2023, arXiv:2302.01766 (Avalanche)"

    def __init__(
        self,
        *,
        benchmark: str,
        arguments: dict[str, Any] | None = None,
        scenario: Scenario | None = None,
        draw_seed: int = 0,
    ) -> None:
        """`benchmark` names a function or class of `avalanche.benchmarks.classic`, or by import path anything that
        returns an Avalanche benchmark; `arguments` are its keyword arguments, plain data, with `${VARIABLES}`
        expanded. `scenario` None: `task` where experiences carry different task labels, `domain` where all have the
        same classes, else `class`. What the benchmark draws (class order, permutations) follows from `draw_seed`
        alone, so that every run sees the same tasks; an argument `seed` of its own comes first."""
        self.benchmark, self.scenario, self.draw_seed = benchmark, scenario, draw_seed
        self.arguments = {name: expanded(value, f"arguments.{name}") for name, value in (arguments or {}).items()}

    def prepare(self) -> None:
        with seeded(self.draw_seed), quiet():
            made = self._made()
            train, test = ([_read(experience, self.benchmark) for experience in getattr(made, name, ())]
                           for name in ("train_stream", "test_stream"))  # fmt: skip
        if not train or len(test) not in (1, len(train)):
            raise ValueError(f"benchmark: {self.benchmark} has {len(train)} train and {len(test)} test experiences; "
                             "it needs a test experience for each, or one for all")  # fmt: skip
        scenario = self.scenario or _scenario(train)
        groups = _groups(train, scenario)
        if len(test) < len(train):
            test = [_of_classes(test[0], rows[1]) for rows in train]
        self.tasks = [
            self._task(index, rows, tests, group)
            for index, (rows, tests, group) in enumerate(zip(train, test, groups))
        ]  # fmt: skip
        outputs = 1 + max(unit for group in groups for unit in group.values())
        shape = tuple(train[0][0].shape[1:])
        self.spec = Spec(kind="classify", input_shape=shape, num_outputs=outputs, scenario=scenario)

    def facts(self) -> Mapping[str, object]:
        return {"benchmark": self.benchmark, "train_rows": [len(task.train) for task in self.tasks]}

    def _made(self) -> Any:
        """The benchmark itself."""
        make = named(self.benchmark, CLASSIC, "benchmark")
        given = dict(self.arguments)
        if "seed" in inspect.signature(make).parameters:
            given.setdefault("seed", self.draw_seed)
        try:
            return make(**given)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"arguments: {self.benchmark} does not take {sorted(given)} ({error})") from error

    def _task(self, index: int, train: Rows, test: Rows, units: Mapping[int, int]) -> Task:
        unknown = sorted(set(test[1].tolist()) - units.keys())
        if unknown:
            raise ValueError(f"benchmark: the test set of experience {index} has the classes {unknown}, which its "
                             "training set lacks")  # fmt: skip
        table = torch.zeros(max(units) + 1, dtype=torch.long)
        for label, unit in units.items():
            table[label] = unit
        train_set, test_set = (TensorData(rows[0], table[rows[1]], task=index) for rows in (train, test))
        name = f"experience-{index}"
        return Task(
            index=index, name=name, train=train_set, test=EvalSet(name=name, data=test_set, scorer=Classify()),
            classes=tuple(sorted(units.values())), headline="accuracy",
        )  # fmt: skip


def named(name: str, home: str, key: str) -> Callable[..., Any]:
    """What `name` means: a member of the Avalanche module `home`, or anything by import path, also from the current
    folder. Raises ValueError that names `key`."""
    module_name, _, member = name.rpartition(".")
    sys.path.append(str(Path.cwd()))
    try:
        with quiet():
            module = importlib.import_module(module_name or home)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: {name!r} needs the module {error.name!r}, which cannot be found") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    found = getattr(module, member, None)
    if not callable(found):
        raise ValueError(f"{key}: {module.__name__} has no {member!r}; give a name from {home}, or an import path")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that Avalanche 0.6.0 and what it imports are known to raise; all others come through."""
    with warnings.catch_warnings():
        for text in ("The distutils package is deprecated", "JAXopt is no longer maintained", "__array_wrap__ must"):
            warnings.filterwarnings("ignore", text, DeprecationWarning)
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global random sources set to `seed`, and as they were afterwards: Avalanche draws from no other."""
    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def expanded(value: Any, key: str) -> Any:
    """Plain data with `${VARIABLES}` in its texts replaced; one that is not set is named."""
    if isinstance(value, str):
        text = os.path.expandvars(value)
        if unset := re.search(r"\$\{?(\w+)", text):
            raise ValueError(f"{key}: {text} needs the environment variable {unset[1]}, which is not set")
        return text
    if isinstance(value, Mapping):
        return {name: expanded(item, f"{key}.{name}") for name, item in value.items()}
    return [expanded(item, key) for item in value] if isinstance(value, list) else value


def _read(experience: Any, benchmark: str) -> Rows:
    """All rows of one experience, without augmentation."""
    from torch.utils.data import DataLoader

    data = experience.dataset.eval()
    try:
        batches = list(DataLoader(data, batch_size=1024, collate_fn=getattr(data, "collate_fn", None)))
        inputs, targets = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"benchmark: {benchmark} does not give tensors of one shape ({error}); make it in a function "
                         "of your own, with evaluation transforms that end in one") from error  # fmt: skip
    labels = [torch.as_tensor(b[-1]) if len(b) > 2 else torch.zeros(len(b[0])) for b in batches]
    return inputs, targets.long(), torch.cat(labels).long()


def _of_classes(rows: Rows, classes: Tensor) -> Rows:
    """The rows that have one of `classes`."""
    chosen = torch.isin(rows[1], classes.unique())
    inputs, targets, labels = rows
    return inputs[chosen], targets[chosen], labels[chosen]


def _scenario(train: Sequence[Rows]) -> Scenario:
    """What a benchmark's own labels say."""
    if len(torch.cat([rows[2] for rows in train]).unique()) > 1:
        return "task"
    classes = [set(rows[1].tolist()) for rows in train]
    return "domain" if len(classes) > 1 and all(group == classes[0] for group in classes) else "class"


def _groups(train: Sequence[Rows], scenario: Scenario) -> list[dict[int, int]]:
    """For each experience the output unit of each of its classes.

    Units are the benchmark's own class numbers; only in the `task` scenario, and only where experiences share class
    numbers, each experience gets units of its own, as the heads of a multi-head model.
    """
    classes = [sorted(set(rows[1].tolist())) for rows in train]
    if scenario == "domain" and any(group != classes[0] for group in classes):
        raise ValueError("scenario: in `domain` all experiences must have the same classes; with a split by classes "
                         "give `class_ids_from_zero_in_each_exp: true` among the arguments")  # fmt: skip
    if scenario != "task" or len(set().union(*classes)) == sum(map(len, classes)):
        return [{label: label for label in group} for group in classes]
    starts = torch.tensor([0, *map(len, classes)]).cumsum(0).tolist()
    return [{label: start + place for place, label in enumerate(group)} for start, group in zip(starts, classes)]
