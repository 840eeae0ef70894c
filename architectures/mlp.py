"""The multilayer perceptron of split and permuted image studies."""

from __future__ import annotations

import math

from torch import nn

from clplat.architectures.base import Architecture, Output, State
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class MLP(Architecture):
    """Fully connected layers with ReLU over flattened inputs."""

    def __init__(self, *, spec: Spec, hidden_sizes: list[int] | None = None, dropout: float = 0.0) -> None:
        """`hidden_sizes` defaults to [400, 400], the network of the class-incremental MNIST literature."""
        super().__init__()
        if spec.vocab_size is not None:
            raise ValueError("MLP: reads numbers, but the stream gives rows of token ids; use TextClassifier")
        if min(hidden_sizes or [1]) < 1:
            raise ValueError(f"hidden_sizes: every layer needs at least one unit, got {hidden_sizes}")
        widths = [math.prod(spec.input_shape), *([400, 400] if hidden_sizes is None else hidden_sizes)]
        layers: list[nn.Module] = [nn.Flatten()]
        for inward, outward in zip(widths, widths[1:]):
            layers += [nn.Linear(inward, outward), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], spec.num_outputs)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C); `hidden` is the input of the head."""
        hidden = self.body(batch.inputs)
        return Output(logits=self.head(hidden), hidden=hidden)
