"""Few-shot streams: perhaps some classes with many rows, then tasks of few, and classes that are never trained."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clplat.streams.base import Budget, EvalSet, Stream
from clplat.streams.episodes import EpisodeShape, Episodic
from clplat.streams.few_shot_sources import READERS, Pool
from clplat.streams.split import Labelled, first_of_each_class, split_tasks


class FewShotStream(Stream):
    """N-way K-shot tasks in a row, each of classes of its own, and novel classes on which few-shot learning is scored.

    With base classes the first task, `base`, has all their training rows. Novel classes reach a learner in probes
    alone: an `Episodic` scorer for each of `episodes`, at every boundary and through every view.
    """

    paper = "Wang et al. 2021, arXiv:2104.09034 (few-shot continual learning; its benchmarks are not public)"

    def __init__(
        self,
        *,
        source: Literal["omniglot", "digits", "cifar10"] = "digits",
        root: str = "data",
        side: int | None = None,
        scenario: Literal["class", "task"] = "class",
        base_classes: int = 0,
        base_epochs: float | None = None,
        num_tasks: int = 2,
        ways: int = 2,
        shots: int = 5,
        novel_classes: int = 3,
        groups: list[str] | None = None,
        novel_groups: list[str] | None = None,
        class_order: Literal["seeded", "fixed"] = "seeded",
        test_fraction: float | None = None,
        episodes: list[EpisodeShape] | None = None,
        num_episodes: int = 600,
        seed: int = 0,
    ) -> None:
        """`num_tasks` tasks of `ways` classes with `shots` training rows each come after `base_classes` with all
        theirs, for which `base_epochs` may stand in place of the study's budget. `novel_classes` stay apart.

        Classes are dealt in the order of their numbers (`fixed`), or shuffled by the run's seed (`seeded`), which also
        draws the shots and the episodes. `groups` (alphabets of omniglot, else class numbers as text) are the only ones
        dealt; novel classes come from `novel_groups` alone where these are given, and trained ones never do. `side` is
        that of Omniglot's images in pixels. `test_fraction` of each class is for scoring (default 0.25; cifar10 has a
        test part). Novel classes are scored in the shapes `episodes` (default: up to five ways, 1 and 5 shots).
        """
        self.source, self.root, self.side, self.scenario, self.seed = source, root, side, scenario, seed
        self.base_classes, self.base_epochs, self.novel_classes = base_classes, base_epochs, novel_classes
        self.num_tasks, self.ways, self.shots, self.class_order = num_tasks, ways, shots, class_order
        self.groups, self.novel_groups, self.test_fraction = groups, novel_groups, test_fraction
        if episodes is None:
            episodes = [EpisodeShape(ways=min(5, novel_classes), shots=shots) for shots in (1, 5)]
        self._check(episodes)
        self.scorers = [Episodic(shape, episodes=num_episodes, seed=seed) for shape in episodes]

    def _check(self, episodes: list[EpisodeShape]) -> None:
        """Refuse options that no data could make good."""
        for name in ("num_tasks", "ways", "shots", "novel_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        base, epochs = self.base_classes, self.base_epochs
        if base < 0 or (epochs is not None and (epochs <= 0 or not base)):
            raise ValueError("base_classes, base_epochs: classes must not be negative, and epochs are positive and for "
                             f"base classes only; got {base} and {epochs}")  # fmt: skip
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction: must be a share between 0 and 1, got {self.test_fraction}")
        if self.source not in READERS:
            raise ValueError(f"source: {', '.join(READERS)}; not {self.source!r}")
        if not episodes or max(shape.ways for shape in episodes) > self.novel_classes:
            raise ValueError(f"episodes: give at least one shape, of no more ways than the {self.novel_classes} "
                             "novel_classes")  # fmt: skip

    def prepare(self) -> None:
        pool = READERS[self.source](self._folder(), self.test_fraction, self.side)
        trained, novel = self._dealt(pool)
        sizes = [self.base_classes] * bool(self.base_classes) + [self.ways] * self.num_tasks
        groups = [tuple(part) for part in torch.tensor(trained).split(sizes)]
        self.spec, self.tasks = split_tasks(
            train=self._shown(pool.train, trained), val=(pool.train[0][:0], pool.train[1][:0]), test=pool.test,
            groups=[tuple(int(label) for label in group) for group in groups], scenario=self.scenario, data=pool.data,
            names=[*["base"] * bool(self.base_classes), *(f"shots-{number + 1}" for number in range(self.num_tasks))],
        )  # fmt: skip
        if self.base_epochs is not None:
            self.tasks[0] = replace(self.tasks[0], budget=Budget(epochs=self.base_epochs))
        self.novel = [(label, pool.groups[label]) for label in novel]
        self.probes = self._probes(pool, novel)

    def _folder(self) -> Path:
        root = Path(os.path.expandvars(self.root)).expanduser()
        if self.source != "digits" and (unset := re.search(r"\$\{?(\w+)", str(root))):
            raise ValueError(f"root: {root} needs the environment variable {unset[1]}, which is not set")
        return root

    def _dealt(self, pool: Pool) -> tuple[list[int], list[int]]:
        """The classes that are trained, in order, and the novel ones."""
        known = sorted(set(pool.groups))
        for option, names in (("groups", self.groups), ("novel_groups", self.novel_groups)):
            if names is not None and not set(names) <= set(known):
                raise ValueError(f"{option}: {self.source} has {', '.join(known)}; got {names}")
        order = list(range(len(pool.groups)))
        if self.class_order == "seeded":
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed)).tolist()
        apart = set(self.novel_groups or ())
        allowed = (set(known) if self.groups is None else set(self.groups)) - apart
        usable = [label for label in order if pool.groups[label] in allowed]
        wanted = self.base_classes + self.num_tasks * self.ways
        strange = [label for label in order if pool.groups[label] in apart] if apart else usable[wanted:]
        if len(usable) < wanted or len(strange) < self.novel_classes:
            there = f"{len(usable)} and {len(strange)} in their groups" if apart else f"{len(usable)} in all"
            raise ValueError(
                f"base_classes, num_tasks, ways, novel_classes: {wanted} classes are to be trained and "
                f"{self.novel_classes} kept apart, but there are {there}; lower one of the four"
            )
        return usable[:wanted], strange[: self.novel_classes]

    def _shown(self, train: Labelled, trained: list[int]) -> Labelled:
        """The training rows that are shown: all of the base classes, `shots` of the others."""
        images, labels = train
        # Shuffled first, so that the shots are a draw and not always the first rows.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        few = order[first_of_each_class(labels[order], self.shots)]
        base = torch.isin(labels, torch.tensor(trained[: self.base_classes], dtype=torch.long))
        kept = base.clone()
        kept[few] = True
        self._check_shots(labels[kept & ~base], trained[self.base_classes :])
        return images[kept], labels[kept]

    def _check_shots(self, labels: Tensor, classes: list[int]) -> None:
        there = int(labels.bincount(minlength=max(classes) + 1)[classes].min())
        if there < self.shots:
            raise ValueError(f"shots: a class has only {there} training rows, got {self.shots}; lower shots or "
                             "test_fraction")  # fmt: skip

    def _probes(self, pool: Pool, novel: list[int]) -> list[EvalSet]:
        """All rows of the novel classes, which count from 0 there, once for each number of shots."""
        images, labels = (torch.cat(parts) for parts in zip(pool.train, pool.test, strict=True))
        place = torch.full((len(pool.groups),), -1)
        place[novel] = torch.arange(len(novel))
        mine = place[labels] >= 0
        data = pool.data(images[mine], place[labels[mine]], task=-1)
        least = int(data.targets.bincount().min())
        for scorer in self.scorers:
            if scorer.shape.rows > least:
                raise ValueError(f"episodes: a novel class has {least} rows, and an episode takes {scorer.shape.rows}; "
                                 "lower shots or queries")  # fmt: skip
        return [
            EvalSet(name=f"novel-{scorer.shape.ways}way-{scorer.shape.shots}shot", data=data, scorer=scorer)
            for scorer in self.scorers
        ]

    def facts(self) -> Mapping[str, object]:
        return {"source": self.source, "novel": " ".join(f"{group}:{label}" for label, group in self.novel)}
