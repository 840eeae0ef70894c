"""The multilayer perceptron of split and permuted image studies."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from clplat.architectures.base import Architecture, Output, State
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class MLP(Architecture):
    """Fully connected layers with ReLU over flattened inputs."""

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_sizes: list[int] | None = None,
        dropout: float = 0.0,
        activation: Literal["relu", "tanh"] = "relu",
        init: Literal["torch", "xavier"] = "torch",
    ) -> None:
        """`hidden_sizes` defaults to [400, 400], the network of the class-incremental MNIST literature. `init`: torch's
        own, or Glorot & Bengio 2010 with normal draws and no bias, which starts from larger weights."""
        super().__init__()
        if activation not in ACTIVATIONS or init not in ("torch", "xavier"):
            raise ValueError("activation, init: must be relu or tanh, and torch or xavier, "
                             f"got {activation!r} and {init!r}")  # fmt: skip
        if spec.vocab_size is not None:
            raise ValueError("MLP: reads numbers, but the stream gives rows of token ids; use TextClassifier")
        if min(hidden_sizes or [1]) < 1:
            raise ValueError(f"hidden_sizes: every layer needs at least one unit, got {hidden_sizes}")
        widths = [math.prod(spec.input_shape), *([400, 400] if hidden_sizes is None else hidden_sizes)]
        layers: list[nn.Module] = [nn.Flatten()]
        for inward, outward in zip(widths, widths[1:]):
            layers += [nn.Linear(inward, outward), ACTIVATIONS[activation]()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], spec.num_outputs)
        if init == "xavier":
            for layer in (module for module in self.modules() if isinstance(module, nn.Linear)):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C); `hidden` is the input of the head."""
        hidden = self.body(batch.inputs)
        return Output(logits=self.head(hidden), hidden=hidden)
