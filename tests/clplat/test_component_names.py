"""A component inside another one's options that does not exist is answered with the names that do."""

from __future__ import annotations

from typing import Any

import pytest
from studies import study

from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.components import Component, arguments, catalogue, checked
from clplat.errors import ConfigError
from clplat.study_file import load_study


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["Titan"], r"layers\.0: expected a list of LayerKind, got \['Titan'\]; did you mean .*'TitansLMM'\?"),
        (["DeltaNet", "TitanLMM"], r"layers\.1: .*got \[DeltaNet, 'TitanLMM'\]; did you mean 'TitansLMM'"),
        ([{"class_path": "Titan"}], r"layers\.0: .*did you mean .*'TitansLMM'"),
        ("TitansLMM", r"layers: expected a list of LayerKind, got TitansLMM; one is a list, too: \[TitansLMM\]"),
        ([3], r"layers\.0: expected a list of LayerKind, got \[3\]; known: Atlas, AttentionLayer, .*TitansLMM"),
        (
            [{"class_path": "TNT", "init_args": {"layer": "Titan"}}],
            r"layers\.0\.init_args\.layer: expected a MemoryLayer, got Titan; did you",
        ),
    ],
    ids=["near", "second", "mapping", "no list", "no name", "inside"],
)
def test_a_layer_that_does_not_exist_is_answered_with_those_that_do(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^architecture\.init_args\.{message}") as caught:
        checked(Component(class_path="MemoryTransformer", init_args={"layers": layers}), "architecture", "architecture")
    assert "collections.abc" not in str(caught.value) and "clplat." not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ["DeltaNet", {"class_path": "TitansLMM", "init_args": {"chunk": 0}}],
            r"layers\.1: TitansLMM\.chunk: must be at",
        ),
        (
            [{"class_path": "TNT", "init_args": {"layer": {"class_path": "TitansLMM", "init_args": {"chunk": 0}}}}],
            r"layers\.0\.init_args\.layer: TitansLMM\.chunk",
        ),
        (
            ["TTTMLP", {"class_path": "MemoryLayer", "init_args": {"rule": {"delta_on": "last"}}}],
            r"layers\.1: rule\.delta_on: last has no effect with delta none",
        ),
        ([{"class_path": "MemoryCaching", "init_args": {"top": 3}}], r"layers\.0: MemoryCaching\.top: 3 has no effect"),
        ([{"class_path": "Moneta", "init_args": {"max_rate": 0.0}}], r"layers\.0: Moneta\.max_rate: must be above 0"),
    ],
    ids=["second", "inside", "rule", "top", "rate"],
)
def test_a_layer_that_cannot_be_built_is_named_by_its_place(layers: Any, message: str) -> None:
    component = Component(class_path="MemoryTransformer", init_args={"layers": layers})
    with pytest.raises(ConfigError, match=rf"^architecture\.init_args\.{message}"):
        arguments(component, "architecture", "architecture")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": "none", "delta_on": "first"}, "options.delta_on: first has no effect with delta none"),
        ({"momentum": False, "momentum_start": 0.3}, "options.momentum_start: 0.3 has no effect with momentum false"),
        ({"decay": False, "decay_start": 0.2}, "options.decay_start: 0.2 has no effect with decay false"),
        ({"decay": False, "generated": ["decay"]}, "options.generated: decay is made for nothing"),
    ],
)
def test_options_of_a_self_modifying_layer_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfModifyingOptions(**options)


def test_levels_that_are_no_list_are_told_to_be_one() -> None:
    levels = {"class_path": "ContinuumMemory", "init_args": {"levels": {"period": 3}}}
    memory = Component(class_path="MemoryTransformer", init_args={"feed_forward": levels})
    with pytest.raises(ConfigError, match=r"levels: expected a list, got \{'period': 3\}; one is a list, too: \[\{"):
        checked(memory, "architecture", "architecture")
    with pytest.raises(ConfigError, match=r"architecture: expected a mapping, got 'MLP'; write \{class_path: MLP\}"):
        load_study(study() | {"architecture": "MLP"})


def test_an_optimizer_inside_another_is_answered_so_too() -> None:
    muon = Component(class_path="Muon", init_args={"others": "Adamm"})
    with pytest.raises(ConfigError, match="others: expected an Optimizer, got Adamm; did you mean 'Adam'.*'AdamW'"):
        checked(muon, "optimizer", "training.optimizer")


def test_layers_are_listed_without_their_bases() -> None:
    found = catalogue("layer")
    assert {"TitansLMM", "MemoryCaching", "TitansMAC", "SelfModifyingTitans", "AttentionLayer"} <= found.keys()
    assert not {"LayerKind", "TitansBlock", "WindowedTitans"} & found.keys()
    assert all(entry.line for entry in found.values())
