"""Memories that cannot do what their strategy is for, or that would hold everything, are refused alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clplat.objective import Objective
from clplat.strategies.base import Strategy
from clplat.strategies.contrastive import SCR
from clplat.strategies.fast_slow import FastSlow
from clplat.strategies.icarl import iCaRL
from clplat.strategies.projection import AGEM, GEM
from clplat.strategies.prototype_answers import PrototypeAnswers
from clplat.strategies.replay import ExperienceReplay, GDumb
from clplat.strategies.toy_run import BATCH, CLASSES, ROWS, TASKS, ToyRun
from clplat.streams.episodes import EpisodeShape

SHAPE = EpisodeShape(ways=2, queries=2)
TOO_FEW: dict[str, Callable[[], Strategy]] = {
    "iCaRL.capacity": lambda: iCaRL(capacity=CLASSES - 1),
    "GDumb.capacity": lambda: GDumb(capacity=CLASSES - 1),
    "SCR.capacity": lambda: SCR(capacity=CLASSES - 1),
    "ExperienceReplay.capacity": lambda: ExperienceReplay(capacity=CLASSES - 1, policy="ring"),
    "GDumb.capacity_bytes": lambda: GDumb(capacity_bytes=150),
}
TOO_MANY: dict[str, Callable[[], Strategy]] = {
    "ExperienceReplay.capacity": lambda: ExperienceReplay(capacity=TASKS * ROWS + 1),
    "AGEM.patterns_per_task": lambda: AGEM(patterns_per_task=ROWS + 1, sample_size=2),
    "GEM.patterns_per_task": lambda: GEM(patterns_per_task=ROWS + 1),
    "FastSlow.memory_per_class": lambda: FastSlow(memory_per_class=ROWS // 2 + 1, episode=SHAPE),
    "PrototypeAnswers.per_class": lambda: PrototypeAnswers(per_class=ROWS // 2 + 1),
    "ExperienceReplay.ratio": lambda: ExperienceReplay(capacity=9, ratio=TASKS * ROWS / BATCH + 1),
}
ENOUGH: list[Callable[[], Strategy]] = [
    lambda: iCaRL(capacity=CLASSES),
    lambda: GDumb(capacity=CLASSES),
    lambda: ExperienceReplay(capacity=1),
    lambda: GEM(patterns_per_task=ROWS),
    lambda: FastSlow(memory_per_class=ROWS // 2, episode=SHAPE),
]


@pytest.mark.parametrize("option", TOO_FEW)
def test_fewer_rows_than_classes_are_refused_where_every_class_needs_one(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: \d rows for {CLASSES} classes .*at least {CLASSES}"):
        ToyRun([TOO_FEW[option]()], Objective)


@pytest.mark.parametrize("option", TOO_MANY)
def test_more_rows_than_there_are_to_train_on_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: .*more .*lower it"):
        ToyRun([TOO_MANY[option]()], Objective)


@pytest.mark.parametrize("number", range(len(ENOUGH)))
def test_the_least_and_the_most_rows_that_make_sense_are_taken(number: int) -> None:
    ToyRun([ENOUGH[number]()], Objective)


def test_of_text_every_task_needs_a_row() -> None:
    with pytest.raises(ValueError, match="GDumb.capacity: 2 rows for 3 classes"):
        ToyRun([GDumb(capacity=2)], Objective, kind="language")
