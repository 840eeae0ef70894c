"""What cannot be is refused by name: sizes and dropout under the decoder's, numbers of option groups that are not
finite."""

from __future__ import annotations

import dataclasses
import math

import pytest

from clplat.architectures.associative_memory.maps import MapOptions
from clplat.architectures.associative_memory.mixer import ProjectionOptions
from clplat.architectures.associative_memory.rule import BiasOptions, MemoryRule
from clplat.architectures.continuum_memory.options import CMSLevel
from clplat.architectures.deepseek_transformer import DeepSeekTransformer
from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.architectures.mamba import Mamba
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.text_classifier import TextClassifier
from clplat.architectures.transformer import Transformer
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions, WriteOptions
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(7,), num_outputs=19)
LABELLED = Spec(kind="classify", input_shape=(7,), num_outputs=3, vocab_size=19, pad_token=0)
LAYERED = (TRC2, Transformer, MoETransformer, DeepSeekTransformer, Mamba, TextClassifier)
GROUPS = (
    ColumnOptions, ThalamusOptions, HippocampusOptions, WriteOptions, BiasOptions, MapOptions, MemoryRule,
    ProjectionOptions, CMSLevel, SelfModifyingOptions,
)  # fmt: skip
WITH_HEADS = (Transformer, MoETransformer, DeepSeekTransformer, TextClassifier)


def refused(kind: type, message: str, **options: object) -> None:
    with pytest.raises(ValueError, match=message):
        kind(spec=LABELLED if kind is TextClassifier else TEXT, **options)


@pytest.mark.parametrize("kind", [*LAYERED, MemoryTransformer])
def test_a_hidden_size_below_one_is_refused_by_name(kind: type) -> None:
    for size in (0, -64):
        refused(kind, f"{kind.__name__}.hidden_size: {size} is below 1", hidden_size=size)


@pytest.mark.parametrize("kind", LAYERED)
def test_a_model_without_layers_is_refused_by_name(kind: type) -> None:
    refused(kind, f"{kind.__name__}.num_layers: 0 is below 1", num_layers=0)


@pytest.mark.parametrize("kind", WITH_HEADS)
def test_a_number_of_heads_below_one_is_refused_by_name(kind: type) -> None:
    refused(kind, f"{kind.__name__}.num_heads: 0 is below 1", num_heads=0)


@pytest.mark.parametrize("kind", [Transformer, MemoryTransformer, TextClassifier])
def test_a_ratio_that_leaves_no_inner_size_is_refused_by_name(kind: type) -> None:
    refused(kind, f"{kind.__name__}.mlp_ratio: 0.0 is not a positive number", mlp_ratio=0.0)


@pytest.mark.parametrize("kind", [*LAYERED, MemoryTransformer])
@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_a_dropout_that_leaves_nothing_is_refused_by_name(kind: type, dropout: float) -> None:
    refused(kind, f"{kind.__name__}.dropout: must be at least 0 and below 1, got {dropout}", dropout=dropout)


@pytest.mark.parametrize("group", GROUPS)
def test_every_number_of_an_option_group_must_be_finite(group: type) -> None:
    numbers = [field.name for field in dataclasses.fields(group) if "float" in str(field.type)]
    assert numbers
    for name in numbers:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name}: must be a finite number, got {value}"):
                group(**{name: value})
