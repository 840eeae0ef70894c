"""Problems for `mlp_memory` and their solutions: `memory_problems` with two layers a head. Shapes: see
`clplat.kernels.mlp_memory.reference`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from memory_problems import Draws, Problems, Sizes, Tensors, given_out

from clplat.kernels.mlp_memory import MLPState, Rule, mlp_memory
from clplat.kernels.mlp_memory.reference import Activation, Bias, recurrent

STATES = ("W1", "W2", "S1", "S2", "anchor1", "anchor2")


@dataclass(frozen=True, kw_only=True)
class Case(Sizes):
    """A problem."""

    inner: int = 32
    activation: Activation = "silu"
    bias: Bias = "l2"
    residual: bool = True

    def __str__(self) -> str:
        gates = "+residual" * self.residual + "+decay" * self.decay + "+momentum" * self.momentum
        sizes = f"T{self.tokens}-C{self.chunk}-D{self.D}-I{self.inner}-E{self.E}-B{self.batch}-H{self.heads}"
        packed = "-packed" * bool(self.lengths) + "-offsets" * bool(self.offsets)
        return f"{self.activation}-{self.bias}{gates}-{sizes}{packed}"

    @property
    def rule(self) -> Rule:
        return Rule(activation=self.activation, bias=self.bias, residual=self.residual)

    @property
    def form(self) -> dict[str, Any]:
        return {"rule": self.rule}

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        found: dict[str, Any] = {"activation": self.activation, "bias": self.bias, "residual": self.residual}
        return found | {"chunk": self.chunk, "cu_seqlens": self.packing(device)}


def problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensors:
    """Random inputs and cotangents; unit keys and small steps, so that no memory diverges."""
    gates = (case.batch, case.length, case.heads)
    draws = Draws(gates)
    unit = torch.nn.functional.normalize(draws.normal(*gates, case.D), dim=-1)
    parts = {"q": draws.normal(*gates, case.D), "k": unit}
    parts |= {"v": draws.normal(*gates, case.E), "do": draws.normal(*gates, case.E)}
    # All tokens of a chunk correct the same error: together they must not overshoot.
    parts["rate"] = draws.uniform(0.3, 3.0) / case.chunk
    # Sums of a chunk's log gates stay small enough that fp32 keeps six digits of their differences.
    parts["log_decay"], parts["log_momentum"] = -(draws.uniform(0, 1) ** 4), draws.uniform(0.5, 0.99).log()
    for name in STATES:
        shape = (case.D, case.inner) if name.endswith("1") else (case.inner, case.E)
        scale = shape[0] ** -0.5 * (0.3 if name.startswith("S") else 1.0)
        each = (case.sequences, case.heads, *shape)
        parts[name], parts["d" + name] = scale * draws.normal(*each), draws.normal(*each)
    return given_out(case, parts, dtype, device)


MLP = Problems(operation=mlp_memory, state=MLPState, states=STATES, recurrent=recurrent, problem=problem)
agrees, assert_close, by = MLP.agrees, MLP.assert_close, MLP.by
called, definition = MLP.called, MLP.definition
read, solved, state_of = MLP.read, MLP.solved, MLP.state_of
