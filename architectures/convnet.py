"""The small convolutional network of few-shot learning."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class ConvNet(Architecture):
    """Blocks of 3×3 convolution, normalisation, ReLU and 2×2 max-pool, and a linear head: "Conv4" at four blocks of 64.

    BatchNorm couples the rows of a training batch; with GroupNorm each stands alone, and no statistics run through the
    stream from task to task.
    """

    paper = "Vinyals et al. 2016, arXiv:1606.04080, §4.1.1"

    def __init__(
        self, *, spec: Spec, width: int = 64, depth: int = 4, norm: Literal["batch", "group"] = "batch"
    ) -> None:
        """`width`: channels of every block. `depth` blocks, each of which halves the sides of the image. `norm`: the
        paper's `batch`, or `group` (of about eight channels each)."""
        super().__init__()
        if spec.kind != "classify" or len(spec.input_shape) != 3:
            raise ValueError(f"ConvNet: reads images (C, H, W); this stream's rows are {spec.input_shape}")
        if width < 1 or depth < 1:
            raise ValueError(f"width, depth: must be at least 1, got {width} and {depth}")
        channels, *sides = spec.input_shape
        if min(sides) >> depth < 1:
            raise ValueError(f"depth: {depth} blocks leave nothing of an image of {sides[0]}×{sides[1]}; lower it")
        self.__dict__["batch_coupled"] = norm == "batch"
        self.image_size = (sides[0], sides[1])
        blocks = []
        for inward in [channels, *[width] * (depth - 1)]:
            blocks += [nn.Conv2d(inward, width, 3, padding=1), _norm(norm, width), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(width * (sides[0] >> depth) * (sides[1] >> depth), spec.num_outputs)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C); `hidden` is the input of the head, the last block's pixels (B, width · H · W)."""
        hidden: Tensor = self.body(batch.inputs)
        return Output(logits=self.head(hidden), hidden=hidden)

    def flops_per_row(self) -> float:
        """2 for each weight of a convolution and each of its output pixels, and 2 for each weight of the head."""
        height, width = self.image_size
        total = self.head.weight.numel()
        for number, part in enumerate(layer for layer in self.body if isinstance(layer, nn.Conv2d)):
            total += part.weight.numel() * (height >> number) * (width >> number)
        return 2.0 * total


def _norm(kind: Literal["batch", "group"], width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    groups = next(count for count in range(max(1, width // 8), 0, -1) if width % count == 0)
    return nn.GroupNorm(groups, width)
