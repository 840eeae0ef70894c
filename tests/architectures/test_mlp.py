"""The MLP of the class-incremental literature."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clplat.architectures.mlp import MLP
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

MNIST = Spec(kind="classify", input_shape=(1, 28, 28), num_outputs=10)


def test_the_default_is_784_400_400_10() -> None:
    model = MLP(spec=MNIST)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(400, 784), (400, 400), (10, 400)]
    assert model.flops_per_row() == 2 * (784 * 400 + 400 * 400 + 400 * 10)


def test_hidden_is_the_input_of_the_head() -> None:
    model, images = MLP(spec=MNIST), torch.randn(3, 1, 28, 28)
    output = model(Batch(inputs=images, targets=torch.zeros(3, dtype=torch.long)))
    assert torch.equal(model.head(output.hidden), output.logits)


def test_glorots_weights_have_their_deviation_and_no_bias() -> None:
    torch.manual_seed(0)
    layers = [m for m in MLP(spec=MNIST, hidden_sizes=[300, 100], init="xavier").modules() if isinstance(m, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(300, 784), (100, 300), (10, 100)]
    for layer in layers:
        outward, inward = layer.weight.shape
        assert float(layer.weight.detach().std()) == pytest.approx((2 / (inward + outward)) ** 0.5, rel=0.1)
        assert not layer.bias.detach().any()


def test_tanh_takes_the_place_of_every_relu() -> None:
    kinds = [type(m) for m in MLP(spec=MNIST, hidden_sizes=[8, 8], activation="tanh").modules()]
    assert kinds.count(nn.Tanh) == 2 and nn.ReLU not in kinds


@pytest.mark.parametrize("option", [{"activation": "gelu"}, {"init": "zeros"}])
def test_unknown_words_are_refused_by_name(option: dict) -> None:
    with pytest.raises(ValueError, match="^activation, init: must be relu or tanh, and torch or xavier"):
        MLP(spec=MNIST, **option)
