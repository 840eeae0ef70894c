"""Problems for `topk_read` and their solutions: what is read, and the gradient of every input, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.topk_memory import topk_read

LEAVES = ("q", "keys", "values")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a problem; `valid` counts slots, or is the share of those that a mask leaves."""

    N: int = 3
    S: int = 40
    D: int = 16
    E: int = 24
    k: int = 5
    valid: int | float | None = None
    whole: bool = True
    """Whole numbers: scores have no rounding and many are equal, so that the order among equals shows."""

    def __str__(self) -> str:
        valid = "" if self.valid is None else f"-valid{self.valid}"
        return f"N{self.N}-S{self.S}-D{self.D}-E{self.E}-k{self.k}{valid}" + "-real" * (not self.whole)

    def valid_on(self, device: str | torch.device) -> Tensor | int | None:
        """As `topk_read` takes it."""
        if not isinstance(self.valid, float):
            return self.valid
        draw = torch.Generator().manual_seed(1)
        return (torch.rand(self.S, generator=draw) < self.valid).to(device)


def problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensors:
    """Inputs, and what flows back into output and weights; the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (case.N, case.D), "keys": (case.S, case.D), "values": (case.S, case.E)}
    flowing = {"doutput": (case.N, case.E), "dweights": (case.N, case.k)}
    parts = {name: torch.randn(shape, generator=draw) for name, shape in (shapes | flowing).items()}
    if case.whole:
        parts |= {name: parts[name].mul(1.5).round().clamp(-3, 3) for name in LEAVES}
    return {name: part.to(device, torch.float32 if name == "dweights" else dtype) for name, part in parts.items()}


def solved(case: Case, given: Tensors, backend: str, temperature: float = 3.0, **named: Any) -> Tensors:
    """The read and its gradients."""
    leaves = {name: given[name].detach().requires_grad_() for name in LEAVES}
    valid = named.pop("valid", case.valid_on(given["q"].device))
    found = topk_read(*leaves.values(), case.k, temperature=temperature, valid=valid, backend=backend, **named)  # type: ignore[arg-type]
    flowing = [given["doutput"], given["dweights"].to(found.weights.dtype)]
    gradients = torch.autograd.grad([found.output, found.weights], list(leaves.values()), flowing)
    outputs = {name: part.detach() for name, part in found._asdict().items()}
    return outputs | {f"d{name}": part for name, part in zip(leaves, gradients, strict=True)}


def definition(case: Case, given: Tensors, **named: Any) -> Tensors:
    """The solution by the definition, in fp64."""
    return solved(case, {name: part.double() for name, part in given.items()}, "reference", **named)


def assert_close(found: Tensors, expected: Tensors, *, forward: float, backward: float) -> None:
    """Same slots everywhere, and all names within a relative error in the Frobenius norm; NaN fails."""
    assert torch.equal(found["indices"], expected["indices"])
    wrong = {}
    for name, part in expected.items():
        error = float((found[name].double() - part).norm() / part.double().norm().clamp(min=1e-6))
        if not error <= (backward if name.startswith("d") else forward):
            wrong[name] = error
    assert not wrong, f"relative errors too large: {wrong}"
