"""Every architecture holds the shared contract: add a line to CONTRACTS for a new one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from delta_steps import assert_dgd_steps

from clplat.architectures.contract import CHECKS
from clplat.architectures.convnet import ConvNet
from clplat.architectures.deepseek_transformer import DeepSeekTransformer
from clplat.architectures.hypernetwork.model import ChunkedHypernetwork, RecurrentHypernetwork
from clplat.architectures.mamba import Mamba
from clplat.architectures.mlp import MLP
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.probing import Contract
from clplat.architectures.recurrent import GRU, LSTM, LeakyRNN
from clplat.architectures.resnet import ResNet32
from clplat.architectures.text_classifier import TextClassifier
from clplat.architectures.transformer import Transformer
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions, WriteOptions
from clplat.architectures.trc2_v1.model import TRC2V1
from clplat.architectures.trc2_v1.options import V1Sizes, V1Switches
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(12,), num_outputs=23)
IMAGES = Spec(kind="classify", input_shape=(1, 5, 4), num_outputs=6, scenario="class")
LABELLED = Spec(kind="classify", input_shape=(12,), num_outputs=6, scenario="class", vocab_size=23, pad_token=5)

CONTRACTS = {
    "mlp": Contract(factory=lambda spec: MLP(spec=spec, hidden_sizes=[32, 16], dropout=0.2), spec=IMAGES),
    "mlp tanh": Contract(
        factory=lambda spec: MLP(spec=spec, hidden_sizes=[16], activation="tanh", init="xavier"), spec=IMAGES
    ),
    "linear": Contract(factory=lambda spec: MLP(spec=spec, hidden_sizes=[]), spec=IMAGES),
    "convnet": Contract(factory=lambda spec: ConvNet(spec=spec, width=12, depth=2), spec=IMAGES),
    "convnet-group": Contract(factory=lambda spec: ConvNet(spec=spec, width=16, depth=2, norm="group"), spec=IMAGES),
    "transformer": Contract(
        factory=lambda spec: Transformer(spec=spec, hidden_size=32, num_layers=2, num_heads=4, dropout=0.2), spec=TEXT
    ),
    "transformer-grouped-untied": Contract(
        factory=lambda spec: Transformer(
            spec=spec, hidden_size=24, num_layers=1, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, tie_head=False
        ),
        spec=TEXT,
    ),
    "text-classifier": Contract(
        factory=lambda spec: TextClassifier(spec=spec, hidden_size=32, num_layers=2, num_heads=4, dropout=0.2),
        spec=LABELLED,
    ),
    "text-classifier-causal": Contract(
        factory=lambda spec: TextClassifier(spec=spec, hidden_size=24, num_layers=1, num_heads=2, attention="causal"),
        spec=LABELLED,
    ),
}


def _small(spec: Spec) -> MLP:
    return MLP(spec=spec, hidden_sizes=[32, 16], dropout=0.2)


COLOURED = Spec(kind="classify", input_shape=(3, 8, 8), num_outputs=6, scenario="task")

CONTRACTS |= {
    "chunked-hypernetwork": Contract(
        factory=lambda spec: ChunkedHypernetwork(spec=spec, target=_small, chunk_size=100), spec=IMAGES
    ),
    "chunked-hypernetwork-resnet": Contract(
        factory=lambda spec: ChunkedHypernetwork(
            spec=spec, target=lambda spec: ResNet32(spec=spec, width=4), chunk_size=1000, hidden_sizes=[8]
        ),
        spec=COLOURED,
    ),
    "recurrent-hypernetwork": Contract(
        factory=lambda spec: RecurrentHypernetwork(spec=spec, target=_small, chunk_size=100, hidden_size=16),
        spec=IMAGES,
    ),
    "recurrent-hypernetwork-growing": Contract(
        factory=lambda spec: RecurrentHypernetwork(spec=spec, target=_small, chunk_size=100, hidden_size=16, grow_by=4),
        spec=IMAGES,
    ),
    "recurrent-hypernetwork-ablated": Contract(
        factory=lambda spec: RecurrentHypernetwork(
            spec=spec, target=_small, chunk_size=100, hidden_size=16, order="permuted", recurrent=False
        ),
        spec=IMAGES,
    ),
}

QUESTIONS = Spec(
    kind="classify", input_shape=(12,), num_outputs=2, scenario="domain", vocab_size=3, pad_token=2, heads=4
)

CONTRACTS |= {
    # The noise with which a row begins in training is no dropout: `evaluates_as_it_trains` needs it off.
    "leaky-rnn": Contract(
        factory=lambda spec: LeakyRNN(spec=spec, hidden_size=24, initial_noise=0.0, measured_steps=2000), spec=LABELLED
    ),
    "leaky-rnn-outside": Contract(
        factory=lambda spec: LeakyRNN(spec=spec, hidden_size=24, leak="outside", initial_noise=0.0), spec=QUESTIONS
    ),
    "leaky-rnn-fixed-embedded": Contract(
        factory=lambda spec: LeakyRNN(spec=spec, hidden_size=24, fixed_tau=1.5, initial_noise=0.0, embedding_size=8),
        spec=LABELLED,
    ),
    "lstm": Contract(factory=lambda spec: LSTM(spec=spec, hidden_size=16, measured_steps=2000), spec=QUESTIONS),
    "lstm-embedded": Contract(factory=lambda spec: LSTM(spec=spec, hidden_size=16, embedding_size=8), spec=LABELLED),
    "gru": Contract(factory=lambda spec: GRU(spec=spec, hidden_size=16), spec=QUESTIONS),
    "gru-embedded": Contract(factory=lambda spec: GRU(spec=spec, hidden_size=16, embedding_size=8), spec=LABELLED),
}

CONTRACTS |= {
    "moe-transformer": Contract(
        factory=lambda spec: MoETransformer(
            spec=spec, hidden_size=32, num_layers=2, num_experts=4, inner_size=24, dropout=0.2
        ),
        spec=TEXT,
    ),
    "moe-transformer-switch": Contract(
        factory=lambda spec: MoETransformer(
            spec=spec, hidden_size=24, num_layers=1, num_heads=2, num_experts=3, experts_per_token=1, inner_size=16,
            renormalise=False, tie_head=False,
        ),
        spec=TEXT,
    ),
    "deepseek-transformer": Contract(
        factory=lambda spec: DeepSeekTransformer(
            spec=spec, hidden_size=32, num_layers=2, num_experts=4, inner_size=24, dropout=0.2
        ),
        spec=TEXT,
    ),
}  # fmt: skip

CONTRACTS |= {
    "mamba": Contract(
        factory=lambda spec: Mamba(spec=spec, hidden_size=32, num_layers=2, state_size=8, dropout=0.2), spec=TEXT
    ),
    "mamba-fed-forward-untied": Contract(
        factory=lambda spec: Mamba(
            spec=spec, hidden_size=24, num_layers=1, expand=3, conv_width=2, mlp_size=40, tie_head=False
        ),
        spec=TEXT,
    ),
}

SMALL = ColumnOptions(num_heads=4, inner_size=16, num_experts=4)
FEW = HippocampusOptions(slots=12, k_read=3)
OFTEN = WriteOptions(chunk=4, quota=6)


def _trc2(spec: Spec, **options: Any) -> TRC2:
    defaults = {"column": SMALL, "thalamus": ThalamusOptions(rank=16), "hippocampus": FEW, "write": OFTEN}
    return TRC2(spec=spec, hidden_size=32, num_layers=3, **(defaults | options))


CONTRACTS |= {
    # The loops are opened by W_z, which begins at zero, and by what the first steps wrote.
    "trc2": Contract(factory=_trc2, spec=TEXT, gradient_steps=5),
    "trc2-other-switches": Contract(
        factory=lambda spec: _trc2(
            spec,
            column=ColumnOptions(num_heads=2, heads_per_kv=2, feed_forward="dense", inner_size=32),
            thalamus=ThalamusOptions(rank=16, surprise="pred", trn="across", modulation="gain", detach=True),
            hippocampus=HippocampusOptions(slots=12, k_read=3, stored="projected", merge="residual", event_gate="hard"),
            write=WriteOptions(chunk=4, quota=6, signal="nll", candidate="mean", eviction="fifo"),
        ),
        spec=TEXT,
        gradient_steps=5,
    ),
    "trc2-no-loops": Contract(
        factory=lambda spec: _trc2(
            spec, thalamus=ThalamusOptions(enabled=False), hippocampus=HippocampusOptions(read=False), dropout=0.0
        ),
        spec=TEXT,
    ),
}

TINY_V1 = V1Sizes(units=4, state_size=6, chunk=4, kernel=3, patterns=5, rank=4)
ALL_OFF = V1Switches(**{field.name: False for field in fields(V1Switches)})

CONTRACTS |= {
    # Paths that begin at zero open one after another.
    "trc2-v1": Contract(
        factory=lambda spec: TRC2V1(spec=spec, hidden_size=32, num_layers=2, sizes=TINY_V1, dropout=0.2),
        spec=TEXT,
        gradient_steps=3,
        isolates_documents=False,
    ),
    "trc2-v1-bare": Contract(
        factory=lambda spec: TRC2V1(
            spec=spec, hidden_size=32, num_layers=2, sizes=replace(TINY_V1, pooling="mean"), switches=ALL_OFF
        ),
        spec=TEXT,
        isolates_documents=False,
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())
def test_architecture(contract: Contract, check: Callable[[Contract], None]) -> None:
    check(contract)


@pytest.mark.parametrize(
    "contract", [pytest.param(made, id=name) for name, made in CONTRACTS.items() if "recurrent-hyper" not in name]
)
def test_delta_gradient_descent_sees_the_inputs_of_every_linear_layer(contract: Contract) -> None:
    assert_dgd_steps(contract)
