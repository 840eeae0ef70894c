"""The rival beside which the speed of TRC² is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions
from clplat.streams.base import Spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPEC = Spec(kind="language", input_shape=(1024,), num_outputs=256)


@pytest.mark.parametrize(("width", "layers"), [(256, 24), (768, 4), (1024, 6)])
def test_the_rival_has_the_active_parameters_of_the_columns(
    width: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from trc2_throughput import active, rival_inner_size

    heads = max(4, width // 64)
    inner = rival_inner_size(width, layers, heads, 1024)
    sizes = {"hidden_size": width, "num_layers": layers}
    rival = active(MoETransformer, SPEC, **sizes, num_heads=heads, inner_size=inner)
    columns = active(
        TRC2, SPEC, **sizes, column=ColumnOptions(num_heads=heads), thalamus=ThalamusOptions(enabled=False),
        hippocampus=HippocampusOptions(read=False),
    )  # fmt: skip
    assert rival == pytest.approx(columns, rel=2e-3)
