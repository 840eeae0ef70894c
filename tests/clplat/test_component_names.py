"""A component inside another one's options that does not exist is answered with the names that do."""

from __future__ import annotations

from typing import Any

import pytest

from clplat.components import Component, catalogue, checked
from clplat.errors import ConfigError


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


def test_an_optimizer_inside_another_is_answered_so_too() -> None:
    muon = Component(class_path="Muon", init_args={"others": "Adamm"})
    with pytest.raises(ConfigError, match="others: expected an Optimizer, got Adamm; did you mean 'Adam'.*'AdamW'"):
        checked(muon, "optimizer", "training.optimizer")


def test_layers_are_listed_without_their_bases() -> None:
    found = catalogue("layer")
    assert {"TitansLMM", "MemoryCaching", "TitansMAC", "SelfModifyingTitans", "AttentionLayer"} <= found.keys()
    assert not {"LayerKind", "TitansBlock", "WindowedTitans"} & found.keys()
    assert all(entry.line for entry in found.values())
