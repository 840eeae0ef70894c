"""The memory's network and the gradient of its inner loss, in closed form.

Nothing here asks autograd for an inner gradient: memories learn under `no_grad` and `inference_mode` as they do in
training, and the outer loss reaches everything through the ordinary operations below. Shapes: see `state.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.rule import Activation, BiasOptions, MemoryRule
from clplat.architectures.associative_memory.state import Layers

Applied = Callable[[int, Tensor], Tensor]
"""From a layer's number and its inputs (B, H, T, I) to its outputs (B, H, T, O)."""

EPSILON = 1e-6
"""Added to the variance under the layer norm."""


def activated(x: Tensor, kind: Activation) -> Tensor:
    """σ(x): exact GELU, or SiLU."""
    return F.gelu(x) if kind == "gelu" else F.silu(x)


def activation_slope(x: Tensor, kind: Activation) -> Tensor:
    """σ′(x)."""
    if kind == "gelu":
        bell = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * bell
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def loss(answer: Tensor, target: Tensor, bias: BiasOptions, threshold: Tensor | None) -> Tensor:
    """The inner loss of every token (…,), of which `loss_slope` is the gradient; for measuring, never for learning."""
    if bias.kind == "dot":
        return -(answer * target).sum(-1)
    error = answer - target
    if bias.kind == "lp":
        return (error.square() + bias.smoothing).pow(bias.power / 2).sum(-1) / bias.power
    if threshold is None:
        return 0.5 * error.square().sum(-1)
    if bias.huber == "feature":
        return _huber(error.abs(), threshold.unsqueeze(-1)).sum(-1)
    size = torch.linalg.vector_norm(error, dim=-1)
    if bias.huber == "norm":
        return _huber(size, threshold)
    beyond = threshold * error.abs().sum(-1) - 0.5 * threshold.square()
    return torch.where(size <= threshold, 0.5 * size.square(), beyond)


def _huber(size: Tensor, most: Tensor) -> Tensor:
    return torch.where(size <= most, 0.5 * size.square(), most * size - 0.5 * most.square())


def loss_slope(answer: Tensor, target: Tensor, bias: BiasOptions, threshold: Tensor | None) -> Tensor:
    """∂loss/∂answer (…, E)."""
    if bias.kind == "dot":
        return -target
    error = answer - target
    if bias.kind == "lp":
        return error * (error.square() + bias.smoothing).pow(bias.power / 2 - 1)
    if threshold is None:
        return error
    most = threshold.unsqueeze(-1)
    if bias.huber == "feature":
        return torch.minimum(torch.maximum(error, -most), most)
    size = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
    if bias.huber == "norm":
        return error * (most / torch.maximum(size, most))
    return torch.where(size <= most, error, most * error.sign())


@dataclass(frozen=True, kw_only=True)
class Network:
    """The form of the memory; its weights are passed in. `scale` and `shift` (H, 1, E) belong to its norm, if any, and
    `norms` (H, 1, O) of every layer to a map that keeps them."""

    rule: MemoryRule
    scale: Tensor | None
    shift: Tensor | None
    norms: Layers = ()

    def read(self, weights: Sequence[Tensor], x_BHTD: Tensor) -> Tensor:
        """The answers (B, H, T, E) of weights that all tokens share."""
        return self.read_by(applied(weights), x_BHTD)

    def read_by(self, layer: Applied, x_BHTD: Tensor) -> Tensor:
        """The answers (B, H, T, E) of layers that may be others for each token."""
        *_, last = self.through(layer, x_BHTD)
        return self.answer(x_BHTD, last)

    def weights(self, state: Layers) -> Layers:
        """The weights of what a memory's state holds behind a chunk."""
        return self.rule.map.weights(state)

    def settled(self, state: Layers) -> Layers:
        """What a memory's state holds behind a chunk, of what its last token left."""
        return self.rule.map.settled(state, self.norms)

    def answer(self, x_BHTD: Tensor, last_BHTE: Tensor) -> Tensor:
        """From what the last layer gives: normalised, and added to what was asked, by several memories' heads where
        there are more of these."""
        if self.scale is not None and self.shift is not None:
            last_BHTE = self.scale * _standardised(last_BHTE)[0] + self.shift
        return matched(x_BHTD, last_BHTE) + last_BHTE if self.rule.memory.residual else last_BHTE

    def gradients(
        self, weights: Sequence[Tensor], k_BHTD: Tensor, v_BHTE: Tensor, threshold: Tensor | None
    ) -> tuple[Layers, Layers]:
        """What each layer read, (B, H, T, I), and the slope of the loss at its output, (B, H, T, O): a token's gradient
        of that layer is their outer product."""
        inputs, before, last = self.through(applied(weights), k_BHTD)
        target = self.read(weights, v_BHTE) if self.rule.target == "self" else v_BHTE
        return tuple(inputs), self.slopes(weights, inputs, before, last, target, threshold)

    def slopes(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], before: Sequence[Tensor], last: Tensor,
        target: Tensor, threshold: Tensor | None,
    ) -> Layers:  # fmt: skip
        """Those of `gradients`, of what `through` found for keys; the first of several layers' weights is not read."""
        k_BHTD = inputs[0]
        # With `single` the erasing takes the old answer off, and the gradient is that of a layer that gave nothing.
        given = torch.zeros_like(last) if self.rule.delta == "single" else last
        slope = loss_slope(self.answer(k_BHTD, given), target, self.rule.bias, threshold)
        if self.scale is not None:
            slope = _slope_below_norm(last, self.scale * slope)
        if self.rule.memory.kind == "swiglu":
            (gate, up), back, kind = before, slope @ weights[2].mT, self.rule.memory.activation
            return back * up * activation_slope(gate, kind), back * activated(gate, kind), slope
        slopes = [slope]
        for weight, x in zip(reversed(weights[1:]), reversed(before)):
            slopes.append((slopes[-1] @ weight.mT) * activation_slope(x, self.rule.memory.activation))
        slopes.reverse()
        if self.rule.max_gradient is not None:
            slopes = [self._shortened(x, slope) for x, slope in zip(inputs, slopes, strict=True)]
        return tuple(slopes)

    def _shortened(self, x: Tensor, slope: Tensor) -> Tensor:
        """The slope with which a token's gradient, their outer product, is no longer than `max_gradient`."""
        assert self.rule.max_gradient is not None
        size = matched(x.square().sum(-1, keepdim=True), slope)
        length = (size * slope.square().sum(-1, keepdim=True)).clamp(min=1e-30).sqrt()
        return slope / (length / self.rule.max_gradient).clamp(min=1.0)

    def through(self, layer: Applied, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs of all layers, inner layers before their activation, and what the last one gives."""
        if self.rule.memory.kind == "swiglu":
            before = [layer(0, x), layer(1, x)]
            inputs = [x, x, activated(before[0], self.rule.memory.activation) * before[1]]
            return inputs, before, layer(2, inputs[2])
        inputs, before = [x], []
        for number in range(self.rule.memory.depth - 1):
            before.append(layer(number, inputs[-1]))
            inputs.append(activated(before[-1], self.rule.memory.activation))
        return inputs, before, layer(self.rule.memory.depth - 1, inputs[-1])


def matched(part_H: Tensor, heads_N: Tensor) -> Tensor:
    """What is known of a head, (…, H, T, D), for each of its memories: further heads, memory after memory.

    Without heads, (T, D) or fewer axes, there is one memory.
    """
    if part_H.ndim < 3:
        return part_H
    count = heads_N.shape[-3] // part_H.shape[-3]
    return part_H.repeat(*[1] * (part_H.ndim - 3), count, 1, 1) if count > 1 else part_H


def applied(weights: Sequence[Tensor]) -> Applied:
    """Layers with weights that all tokens share."""
    return lambda number, x: x @ weights[number]


def _standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 over features, and the factor that made it so."""
    centred = x - x.mean(-1, keepdim=True)
    factor = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return centred * factor, factor


def _slope_below_norm(x: Tensor, slope: Tensor) -> Tensor:
    """The slope at x from that at its standardised form (Ba et al. 2016)."""
    standard, factor = _standardised(x)
    along = (slope * standard).mean(-1, keepdim=True)
    return factor * (slope - slope.mean(-1, keepdim=True) - standard * along)
