"""The memory's network and the gradient of its inner loss, in closed form.

Nothing here asks autograd for an inner gradient: memories learn under `no_grad` and `inference_mode` as they do in
training, and the outer loss reaches everything through the ordinary operations below. Shapes: see `state.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.rule import Activation, BiasOptions, MemoryRule
from clplat.architectures.associative_memory.state import Layers

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
    size, most = error.abs(), threshold.unsqueeze(-1)
    return torch.where(size <= most, 0.5 * size.square(), most * size - 0.5 * most.square()).sum(-1)


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
    return torch.minimum(torch.maximum(error, -most), most)


@dataclass(frozen=True, kw_only=True)
class Network:
    """The form of the memory; its weights are passed in. `scale` and `shift` (H, 1, E) belong to its norm, if any."""

    rule: MemoryRule
    scale: Tensor | None
    shift: Tensor | None

    def read(self, weights: Sequence[Tensor], x_BHTD: Tensor) -> Tensor:
        """The answers (B, H, T, E) of weights that all tokens share."""
        *_, last = self._through(weights, x_BHTD)
        return self.answer(x_BHTD, last)

    def answer(self, x_BHTD: Tensor, last_BHTE: Tensor) -> Tensor:
        """From what the last layer gives: normalised, and added to what was asked."""
        if self.scale is not None and self.shift is not None:
            last_BHTE = self.scale * _standardised(last_BHTE)[0] + self.shift
        return x_BHTD + last_BHTE if self.rule.memory.residual else last_BHTE

    def gradients(
        self, weights: Sequence[Tensor], k_BHTD: Tensor, v_BHTE: Tensor, threshold: Tensor | None
    ) -> tuple[Layers, Layers]:
        """What each layer read, (B, H, T, I), and the slope of the loss at its output, (B, H, T, O): a token's gradient
        of that layer is their outer product."""
        inputs, before, last = self._through(weights, k_BHTD)
        target = self.read(weights, v_BHTE) if self.rule.target == "self" else v_BHTE
        slope = loss_slope(self.answer(k_BHTD, last), target, self.rule.bias, threshold)
        if self.scale is not None:
            slope = _slope_below_norm(last, self.scale * slope)
        slopes = [slope]
        for weight, x in zip(reversed(weights[1:]), reversed(before)):
            slopes.append((slopes[-1] @ weight.mT) * activation_slope(x, self.rule.memory.activation))
        return tuple(inputs), tuple(reversed(slopes))

    def _through(self, weights: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs of all layers, inner layers before their activation, and what the last one gives."""
        inputs, before = [x], []
        for weight in weights[:-1]:
            before.append(inputs[-1] @ weight)
            inputs.append(activated(before[-1], self.rule.memory.activation))
        return inputs, before, inputs[-1] @ weights[-1]


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
