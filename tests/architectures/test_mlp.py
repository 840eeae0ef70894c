"""The MLP of the class-incremental literature."""

from __future__ import annotations

import torch

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
