"""Residual networks for small images: the ResNet-18 of the continual-learning literature, its slim form, ResNet-32.

The stem is one 3×3 convolution without pooling, which leaves a 32×32 image its resolution (He et al. 2016,
arXiv:1512.03385, §4.2; for ResNet-18 it takes the place of the 7×7 convolution and the max-pool of ImageNet).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

Shortcut = Literal["projection", "pad"]


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut: relu(F(x) + shortcut(x)).

    Where the shape changes, the shortcut is a 1×1 convolution (`projection`, option B of the paper), or takes every
    `stride`-th pixel and fills the new channels with zeros on both sides (`pad`, option A, without parameters).
    """

    def __init__(self, inward: int, outward: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outward)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outward)
        self.stride, self.grown = stride, outward - inward
        self.project: nn.Module | None = None
        if shortcut == "projection" and (stride != 1 or inward != outward):
            self.project = nn.Sequential(
                nn.Conv2d(inward, outward, 1, stride=stride, bias=False), nn.BatchNorm2d(outward)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x_BCHW)), inplace=True)
        return F.relu(self.norm2(self.conv2(inner)) + self._shortcut(x_BCHW), inplace=True)

    def _shortcut(self, x_BCHW: Tensor) -> Tensor:
        if self.project is not None:
            return self.project(x_BCHW)
        if self.stride == 1 and not self.grown:
            return x_BCHW
        before = self.grown // 2
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.grown - before))


class _ResNet(Architecture):
    """Stem, stages of blocks (each but the first halves the resolution), mean over pixels, linear head.

    BatchNorm couples the rows of a training batch, replayed rows included. Convolutions begin as in He et al. 2015.
    """

    batch_coupled = True
    paper = "He et al. 2016, arXiv:1512.03385"

    def __init__(self, *, spec: Spec, widths: list[int], depth: int, shortcut: Shortcut) -> None:
        """`widths`: channels of each stage; `depth`: blocks in each."""
        super().__init__()
        if spec.kind != "classify" or len(spec.input_shape) != 3:
            raise ValueError(f"{type(self).__name__} reads images (C, H, W); this stream's rows are {spec.input_shape}")
        if widths[0] < 1:
            raise ValueError(f"width: must be at least 1, got {widths[0]}")
        self.image_size = spec.input_shape[1:]
        self.stem = nn.Conv2d(spec.input_shape[0], widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks: list[Block] = []
        for stage, (inward, outward) in enumerate(zip([widths[0], *widths], widths)):
            for number in range(depth):
                first = number == 0
                stride = 2 if first and stage else 1
                blocks.append(Block(inward if first else outward, outward, stride=stride, shortcut=shortcut))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], spec.num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C); `hidden` is the input of the head, the mean over pixels of the last stage."""
        inner = F.relu(self.norm(self.stem(batch.inputs)), inplace=True)
        hidden = self.blocks(inner).mean((2, 3))
        return Output(logits=self.head(hidden), hidden=hidden)

    def flops_per_row(self) -> float:
        """2 for each weight of a convolution and each of its output pixels, and 2 for each weight of the head."""
        height, width = self.image_size
        total = self.stem.weight.numel() * height * width
        for block in self.blocks:
            assert isinstance(block, Block)
            # Halving rounds up: 3×3 with padding 1, and 1×1 without.
            height, width = -(-height // block.stride), -(-width // block.stride)
            weights = sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Conv2d))
            total += weights * height * width
        return 2.0 * (total + self.head.weight.numel())


class ResNet18(_ResNet):
    """ResNet-18 for small images: four stages of two blocks, 64 to 512 channels, 11.2 million parameters."""

    paper = "He et al. 2016, arXiv:1512.03385"

    def __init__(self, *, spec: Spec, width: int = 64) -> None:
        """`width`: channels of the first stage; every later stage has twice those of the one before."""
        super().__init__(spec=spec, widths=[width, 2 * width, 4 * width, 8 * width], depth=2, shortcut="projection")


class SlimResNet18(ResNet18):
    """ResNet-18 with 20 to 160 channels, the network of GEM and of much after it: 1.1 million parameters."""

    paper = "Lopez-Paz & Ranzato 2017, arXiv:1706.08840"

    def __init__(self, *, spec: Spec, width: int = 20) -> None:
        super().__init__(spec=spec, width=width)


class ResNet32(_ResNet):
    """ResNet-32 for CIFAR: three stages of five blocks, 16, 32 and 64 channels, shortcuts without parameters."""

    paper = "He et al. 2016, arXiv:1512.03385, §4.2"

    def __init__(self, *, spec: Spec, width: int = 16) -> None:
        """`width`: channels of the first stage; every later stage has twice those of the one before."""
        super().__init__(spec=spec, widths=[width, 2 * width, 4 * width], depth=5, shortcut="pad")
