"""Random crops and flips: every image is one of its own crops, drawn alone, from the global generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.augmentation import CropAndFlip


def crops(image: Tensor, padding: int, flip: bool) -> list[Tensor]:
    """Every result that one image (C, H, W) may have, in the plain way."""
    height, width = image.shape[1:]
    padded = F.pad(image, (padding,) * 4)
    found = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return found + [crop.flip(2) for crop in found if flip]


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (1, False), (0, True), (3, True)])
def test_every_image_becomes_one_of_its_own_crops_and_each_of_them_occurs(padding: int, flip: bool) -> None:
    torch.manual_seed(0)
    image = torch.randn(3, 5, 7)
    allowed = torch.stack(crops(image, padding, flip))
    results = CropAndFlip(padding=padding, flip=flip)(image.expand(1500, -1, -1, -1))
    same = (results.unsqueeze(1) == allowed).flatten(2).all(2)
    assert bool((same.sum(1) == 1).all()), "a result is no crop of the image"
    counts = same.sum(0).double()
    expected = 1500 / len(allowed)
    assert bool(((counts - expected).abs() < 5 * expected**0.5).all()), "crops are not drawn evenly"


def test_rows_of_a_batch_are_drawn_alone_and_every_use_anew() -> None:
    torch.manual_seed(0)
    images, augment = torch.randn(1, 3, 16, 16).expand(32, -1, -1, -1).contiguous(), CropAndFlip()
    first, second = augment(images), augment(images)
    assert len(first.unique(dim=0)) > 20 and not torch.equal(first, second)


def test_rows_do_not_mix_and_channels_move_together() -> None:
    images = torch.arange(1.0, 9).view(8, 1, 1, 1) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1).expand(8, 2, 6, 6)
    results = CropAndFlip(padding=2)(images)
    for number, result in enumerate(results):
        assert set(result[0].unique().tolist()) <= {0.0, number + 1.0}
        assert torch.equal(result[1], 10 * result[0])


def test_draws_come_from_torchs_global_generator_alone() -> None:
    images, augment = torch.randn(8, 3, 8, 8), CropAndFlip()
    state = torch.get_rng_state()
    first = augment(images)
    torch.set_rng_state(state)
    assert torch.equal(first, augment(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_type_stay_and_the_input_is_left_alone(dtype: torch.dtype) -> None:
    images = torch.randn(4, 3, 6, 9).to(dtype)
    before = images.clone()
    result = CropAndFlip(padding=1)(images)
    assert result.shape == images.shape and result.dtype == dtype and torch.equal(images, before)


def test_a_negative_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="padding: must not be negative"):
        CropAndFlip(padding=-1)
