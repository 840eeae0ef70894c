"""Problems for `delta_memory` and their solutions: `memory_problems` with one matrix a head. Shapes: see
`clplat.kernels.delta_memory.reference`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from memory_problems import Draws, Problems, Sizes, Tensors, covering, distances, given_out  # noqa: F401

from clplat.kernels.delta_memory import MemoryState, Mode, delta_memory
from clplat.kernels.delta_memory.reference import recurrent

# The tests of `self_modifying` take `covering` and `distances` from here.
STATES = ("W", "S", "anchor")


@dataclass(frozen=True, kw_only=True)
class Case(Sizes):
    """A problem; each key's head serves `group` heads of values."""

    mode: Mode
    group: int = 1

    def __str__(self) -> str:
        gates = "+decay" * self.decay + "+momentum" * self.momentum
        sizes = f"T{self.tokens}-C{self.chunk}-D{self.D}-E{self.E}-B{self.batch}-H{self.heads}x{self.group}"
        return f"{self.mode}{gates}-{sizes}" + "-packed" * bool(self.lengths) + "-offsets" * bool(self.offsets)

    @property
    def form(self) -> dict[str, Any]:
        return {"mode": self.mode}

    @property
    def anchored(self) -> bool:
        return self.mode == "frozen"

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        return {"mode": self.mode, "chunk": self.chunk, "cu_seqlens": self.packing(device)}


def problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensors:
    """Random inputs and cotangents; unit keys, so that no mode diverges."""
    T, V = case.length, case.heads * case.group
    keys, values = (case.batch, T, case.heads, case.D), (case.batch, T, V, case.E)
    draws = Draws((case.batch, T, V))
    unit = torch.nn.functional.normalize(draws.normal(*keys), dim=-1)
    parts = {"q": draws.normal(*keys), "k": unit, "v": draws.normal(*values), "do": draws.normal(*values)}
    # All tokens of a frozen chunk correct the same error: together they must not overshoot.
    parts["rate"] = draws.uniform(0.02, 0.2) if case.mode == "frozen" else draws.uniform(0.05, 1.0)
    parts["log_decay"], parts["log_momentum"] = -(draws.uniform(0, 1.6) ** 4), draws.uniform(0.5, 0.99).log()
    shape = (case.sequences, V, case.D, case.E)
    for name in STATES:
        parts[name], parts["d" + name] = draws.normal(*shape), draws.normal(*shape)
    return given_out(case, parts, dtype, device)


DELTA = Problems(operation=delta_memory, state=MemoryState, states=STATES, recurrent=recurrent, problem=problem)
agrees, assert_close, by = DELTA.agrees, DELTA.assert_close, DELTA.by
called, definition = DELTA.called, DELTA.definition
read, solved, state_of = DELTA.read, DELTA.solved, DELTA.state_of
