"""ConvNet: the network of the few-shot literature by its numbers, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from clplat.architectures.convnet import ConvNet
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

OMNIGLOT = Spec(kind="classify", input_shape=(1, 28, 28), num_outputs=5, scenario="class")


def test_conv4_has_the_parameters_and_features_of_the_literature() -> None:
    model = ConvNet(spec=OMNIGLOT)
    convolutions = (9 * 1 + 1) * 64 + 3 * (9 * 64 + 1) * 64
    assert sum(p.numel() for p in model.body.parameters()) == convolutions + 4 * 2 * 64 == 111_936
    output = model(Batch(inputs=torch.rand(3, 1, 28, 28), targets=torch.zeros(3, dtype=torch.long)))
    assert output.hidden.shape == (3, 64) and output.logits.shape == (3, 5)
    assert model.flops_per_row() == 2 * (576 * 28**2 + 36864 * (14**2 + 7**2 + 3**2) + 64 * 5)


def test_only_batch_norm_couples_the_rows_of_a_batch() -> None:
    assert ConvNet(spec=OMNIGLOT).batch_coupled and not ConvNet(spec=OMNIGLOT, norm="group").batch_coupled


def test_group_norm_fits_any_width() -> None:
    for width in (1, 6, 7, 24, 50):
        model = ConvNet(spec=OMNIGLOT, width=width, depth=1, norm="group")
        assert model(Batch(inputs=torch.rand(2, 1, 28, 28), targets=torch.zeros(2))).logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"depth": 5}, "depth: 5 blocks leave nothing of an image of 28×28"), ({"width": 0}, "width, depth: .* got 0")],
)
def test_what_cannot_be_built_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNet(spec=OMNIGLOT, **options)


def test_rows_that_are_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads images \(C, H, W\); this stream's rows are \(12,\)"):
        ConvNet(spec=Spec(kind="classify", input_shape=(12,), num_outputs=3))
