"""What cannot stand side by side in one run is refused by name, before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
from studies import EWC, REPLAY, study

from clplat.errors import ConfigError
from clplat.hooks import Hooks
from clplat.strategies.base import Strategy
from clplat.strategies.replay import ExperienceReplay
from clplat.study import preflight
from clplat.study_file import expand, load_study

LA_MAML = {"class_path": "LaMAML", "init_args": {"capacity": 20}}
TARGET = {"class_path": "MLP", "init_args": {"hidden_sizes": [8]}}
GROWING = {
    "class_path": "RecurrentHypernetwork",
    "init_args": {"target": TARGET, "chunk_size": 200, "hidden_size": 8, "grow_by": 2},
}
CHUNKED = {"class_path": "ChunkedHypernetwork", "init_args": {"target": TARGET, "chunk_size": 200}}
GDUMB = {"class_path": "GDumb", "init_args": {"capacity": 20}}
BESIDE_THE_STEP = {
    "penalty": EWC,
    "objective": {"class_path": "ERACE", "init_args": {"capacity": 20}},
    "gradient": {"class_path": "AGEM", "init_args": {"patterns_per_task": 10, "sample_size": 10}},
    "penalty and gradient": {"class_path": "SI", "init_args": {"strength": 1.0}},
}


def refused(message: str, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(expand(load_study(study(**changes))))


@pytest.mark.parametrize("hook", BESIDE_THE_STEP)
def test_a_strategy_whose_hook_the_owner_of_the_step_would_never_call_is_refused(hook: str) -> None:
    refused(
        rf"strategies\.other: its {hook} would never be called, because strategies\.maml \(LaMAML\) owns",
        strategies={"maml": LA_MAML, "other": BESIDE_THE_STEP[hook]},
    )


class Misspelled(Strategy):
    def penaltyy(self) -> None: ...


class OwnMethods(ExperienceReplay):
    def penalty_weight(self) -> None: ...

    def _penaltyy(self) -> None: ...


def test_a_method_of_nearly_a_hooks_name_is_refused_and_a_strategys_own_methods_are_not() -> None:
    with pytest.raises(
        ConfigError, match=r"strategies\.mine: Misspelled\.penaltyy is no hook .* call it penalty, or _"
    ):
        Hooks({"mine": Misspelled()})
    Hooks({"mine": OwnMethods(capacity=4)})


def test_strategies_that_leave_the_step_alone_stand_beside_its_owner() -> None:
    preflight(expand(load_study(study(strategies={"maml": LA_MAML, "all": {"class_path": "Cumulative"}}))))


@pytest.mark.parametrize(("one", "other"), [("Joint", "Cumulative"), ("Joint", "GDumb")])
def test_two_owners_of_the_training_data_are_refused(one: str, other: str) -> None:
    strategies = {"a": {"class_path": one}, "b": GDUMB if other == "GDumb" else {"class_path": other}}
    refused("a and b both define `train_data`", strategies=strategies)


@pytest.mark.parametrize(
    ("architecture", "changes", "key"),
    [
        (GROWING, {"strategies": {"hold": EWC}}, r"strategies\.hold"),
        (
            GROWING,
            {"strategies": {"hold": {"class_path": "RWalk", "init_args": {"strength": 1.0}}}},
            r"strategies\.hold",
        ),
        (GROWING, {"training__optimizer_state": "keep"}, r"training\.optimizer_state"),
        (CHUNKED, {"strategies": {"dumb": GDUMB}}, r"strategies\.dumb"),
    ],
)
def test_a_model_that_will_grow_is_refused_where_its_shape_must_stay(
    architecture: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    refused(
        rf"{key}: needs a model that keeps its shape, and \w+Hypernetwork grows", architecture=architecture, **changes
    )


def test_a_model_whose_trained_weights_keep_their_shape_is_held_and_keeps_its_momenta() -> None:
    held = study(architecture=CHUNKED, strategies={"hold": EWC, "er": REPLAY}, training__optimizer_state="keep")
    preflight(expand(load_study(held)))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (LA_MAML, r"^strategies\.one: LaMAML: owns the step.*devices: 1"),
        (BESIDE_THE_STEP["gradient"] | {"init_args": {"patterns_per_task": 9, "sample_size": 9}},
         r"^strategies\.one: AGEM\.patterns_per_task: 9 rows cannot be shared equally by 2"),
    ],
)  # fmt: skip
def test_what_several_processes_cannot_share_is_refused_before_they_start(
    strategy: dict[str, Any], message: str
) -> None:
    refused(message, strategies={"one": strategy}, training__devices=2, training__accelerator="cpu")
