"""Feed-forward layers seen as key-value memories: where they are, what their rows are, and how they are widened.

    FFN(a) = V^T φ(K a)                   two layers          keys K (m, d), values V (m, d)
    FFN(a) = V^T (φ(G a) ⊙ K a)           gated               gates G (m, d) as well

Shapes: m inner size, d hidden size, r new rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.layers import SwiGLU
from clplat.architectures.lora import EXPERTS

FUSED_GATES = ("gate_up_proj", "Wi")
"""Names of pretrained layers that hold gates and keys side by side."""
TWO_LAYERS = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
"""First and last layer of Phi's, of GPT-2's and of GPT-NeoX's feed-forward layer."""
ACTIVATIONS = ("activation_fn", "act_fn", "act", "activation")


class FeedForward(ABC):
    """One feed-forward layer; `module` is the layer itself, which `widened` changes."""

    gated: bool

    def __init__(self, module: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        self.module, self.activation = module, activation

    @abstractmethod
    def keys(self) -> Tensor:
        """(m, d)."""

    def gates(self) -> Tensor:
        """(m, d)."""
        raise ValueError(f"{type(self.module).__name__} has no gates")

    @abstractmethod
    def values(self) -> Tensor:
        """(m, d)."""

    @abstractmethod
    def inner(self, x: Tensor) -> Tensor:
        """How active every row is on inputs (…, d): (…, m)."""

    @abstractmethod
    def widen(self, keys_rd: Tensor, gates_rd: Tensor | None, values_rd: Tensor) -> None:
        """Give the layer r more rows."""

    def value_norm(self) -> float:
        """Mean norm of the values."""
        return float(self.values().detach().double().norm(dim=1).mean())


class SeparateGLU(FeedForward):
    """Llama's, Mistral's and Qwen's layer: down_proj(φ(gate_proj(x)) · up_proj(x))."""

    gated = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, _activation(module))
        self.gate, self.up, self.down = (_linear(module, f"{name}_proj") for name in ("gate", "up", "down"))

    def keys(self) -> Tensor:
        return self.up.weight

    def gates(self) -> Tensor:
        return self.gate.weight

    def values(self) -> Tensor:
        return self.down.weight.T

    def inner(self, x: Tensor) -> Tensor:
        return self.activation(self.gate(x)) * self.up(x)

    def widen(self, keys_rd: Tensor, gates_rd: Tensor | None, values_rd: Tensor) -> None:
        assert gates_rd is not None
        _add_outputs(self.gate, gates_rd)
        _add_outputs(self.up, keys_rd)
        _add_inputs(self.down, values_rd)
        _set_width(self.module, self.down.in_features)


class JoinedGLU(FeedForward):
    """This repository's `SwiGLU`, whose gates and keys lie in one matrix, gates first."""

    gated = True

    def __init__(self, module: SwiGLU) -> None:
        super().__init__(module, F.silu)
        self.gate_up, self.down = module.gate_up, module.down

    def keys(self) -> Tensor:
        return self.gate_up.weight.chunk(2)[1]

    def gates(self) -> Tensor:
        return self.gate_up.weight.chunk(2)[0]

    def values(self) -> Tensor:
        return self.down.weight.T

    def inner(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def widen(self, keys_rd: Tensor, gates_rd: Tensor | None, values_rd: Tensor) -> None:
        assert gates_rd is not None
        gates, keys = self.gate_up.weight.chunk(2)
        parts = [part.to(keys) for part in (gates, gates_rd, keys, keys_rd)]
        _replace(self.gate_up, torch.cat(parts), None)
        _add_inputs(self.down, values_rd)


class TwoLayers(FeedForward):
    """last(φ(first(x))), linear layers or GPT-2's `Conv1D`, whose weights are transposed."""

    gated = False

    def __init__(self, module: nn.Module, first: str, last: str) -> None:
        super().__init__(module, _activation(module))
        self.first, self.last = cast(Any, getattr(module, first)), cast(Any, getattr(module, last))

    def keys(self) -> Tensor:
        return self.first.weight.T if _transposed(self.first) else self.first.weight

    def values(self) -> Tensor:
        return self.last.weight if _transposed(self.last) else self.last.weight.T

    def inner(self, x: Tensor) -> Tensor:
        return self.activation(self.first(x))

    def widen(self, keys_rd: Tensor, gates_rd: Tensor | None, values_rd: Tensor) -> None:
        _add_outputs(self.first, keys_rd)
        _add_inputs(self.last, values_rd)


def view_of(module: nn.Module) -> FeedForward | None:
    """The layer as a memory; None where it is no feed-forward layer that is known."""
    if isinstance(module, SwiGLU):
        return JoinedGLU(module)
    if all(isinstance(getattr(module, f"{name}_proj", None), nn.Linear) for name in ("gate", "up", "down")):
        return SeparateGLU(module)
    for first, last in TWO_LAYERS:
        ends = [getattr(module, name, None) for name in (first, last)]
        if all(isinstance(end, nn.Linear) or _transposed(end) for end in ends) and _has_activation(module):
            return TwoLayers(module, first, last)
    return None


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward layers of a model by path. ValueError for experts, for layers that hold several matrices, for
    layers of both kinds in one model, and where there are none that are known."""
    name = type(model).__name__
    for path, _ in model.named_parameters():
        parts = path.split(".")
        if EXPERTS in parts or "router" in parts:
            raise ValueError(f"model: {name} has experts ({path}), and side memories beside routed layers are not "
                             "supported; choose a model with one feed-forward layer a block")  # fmt: skip
        if fused := next((part for part in parts if part in FUSED_GATES), None):
            raise ValueError(f"model: {name} holds gates and keys in one matrix ({path}), of which {fused!r} does not "
                             "say the order; choose a model that keeps gate_proj and up_proj apart")  # fmt: skip
    views = {path: view for path, module in model.named_modules() if (view := view_of(module)) is not None}
    if not views:
        raise ValueError(
            f"model: {name} has no feed-forward layer that is known; memories stand beside gate_proj, up_proj and "
            "down_proj (Llama, Mistral, Qwen), this repository's SwiGLU, or two layers in a module of their own "
            "(fc1 and fc2, c_fc and c_proj, dense_h_to_4h and dense_4h_to_h)"
        )
    if len({view.gated for view in views.values()}) > 1:
        raise ValueError(f"model: {name} mixes gated feed-forward layers with others; memories need one kind")
    return {path: view.module for path, view in views.items()}


def _linear(module: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, getattr(module, name))


def _transposed(layer: Any) -> bool:
    """Whether it is transformers' Conv1D, with weights (in, out)."""
    return isinstance(layer, nn.Module) and hasattr(layer, "nf")


def _has_activation(module: nn.Module) -> bool:
    return any(callable(getattr(module, name, None)) for name in ACTIVATIONS)


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return next(found for name in ACTIVATIONS if callable(found := getattr(module, name, None)))


def _add_outputs(layer: Any, rows: Tensor) -> None:
    """More output units, without bias where there are biases."""
    axis = 1 if _transposed(layer) else 0
    weight = torch.cat([layer.weight, (rows.T if axis else rows).to(layer.weight)], dim=axis)
    bias = None if layer.bias is None else F.pad(layer.bias, (0, len(rows)))
    _replace(layer, weight, bias)


def _add_inputs(layer: Any, rows: Tensor) -> None:
    """More input units; biases stay."""
    axis = 0 if _transposed(layer) else 1
    weight = torch.cat([layer.weight, (rows if axis == 0 else rows.T).to(layer.weight)], dim=axis)
    _replace(layer, weight, layer.bias)


def _replace(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    if _transposed(layer):
        layer.nx, layer.nf = weight.shape
    else:
        layer.out_features, layer.in_features = weight.shape


def _set_width(module: nn.Module, width: int) -> None:
    if hasattr(module, "intermediate_size"):
        module.intermediate_size = width
