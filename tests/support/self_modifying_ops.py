"""Problems for the operation `self_modifying` and their solutions: outputs, end states and all gradients by name.

Names in problems: the arguments' own, and `do`, `dW`, `dS`, `danchor` for what flows back into outputs. In solutions
`d` before an argument's name is its gradient. Shapes: see `clplat.kernels.self_modifying.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from delta_memories import Tensors, distances
from torch import Tensor

from clplat.kernels.delta_memory.reference import LOWEST_GATE
from clplat.kernels.self_modifying import Inputs, Readouts, Rule, SelfModifyingState, self_modifying
from clplat.kernels.self_modifying.reference import Delta, recurrent

TOKENWISE = ("x", "q", "log_momentum", "damping")
READ = ("rate", "rate_bias", "decay", "decay_bias")
STATES = ("W", "S", "anchor")
NARROW = ("x", "q", "do")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a problem; `lengths` packs sequences into one row, `offsets` continues open chunks of each."""

    tokens: int = 18
    chunk: int = 16
    D: int = 16
    batch: int = 1
    heads: int = 1
    delta: Delta = "double"
    max_gradient: float | None = 0.5
    unit_values: bool = True
    decay: bool = True
    momentum: bool = True
    damped: bool = True
    own: bool = False
    self_targets: bool = True
    lengths: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None

    def __str__(self) -> str:
        gates = "+decay" * self.decay + "+momentum" * self.momentum + "+damped" * self.damped + "+own" * self.own
        gates += "-values" * (not self.self_targets)
        sizes = f"T{self.tokens}-C{self.chunk}-D{self.D}-B{self.batch}-H{self.heads}"
        packed = "-packed" * bool(self.lengths) + "-offsets" * bool(self.offsets)
        return f"{self.delta}-{self.max_gradient}{'-unit' * self.unit_values}{gates}-{sizes}{packed}"

    @property
    def rule(self) -> Rule:
        return Rule(
            delta=self.delta, max_rate=0.8, max_gradient=self.max_gradient, unit_values=self.unit_values,
            self_targets=self.self_targets,
        )  # fmt: skip

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The arguments that are not tensors of a problem, but for the state's offset."""
        found: dict[str, Any] = {"rule": self.rule, "chunk": self.chunk}
        if self.lengths is not None:
            ends = [sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)]
            found["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
        return found


def problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensors:
    """Random inputs and cotangents, the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    T = case.tokens if case.lengths is None else sum(case.lengths)
    N = case.batch if case.lengths is None else len(case.lengths)
    gates, H, D = (case.batch, T, case.heads), case.heads, case.D

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(gates, generator=draw, dtype=torch.float64)

    inputs = (3 + case.decay, D) if case.own else (D,)
    parts = {"x": normal(*gates, *inputs), "q": F.normalize(normal(*gates, D), dim=-1), "do": normal(*gates, D)}
    parts |= {"log_momentum": uniform(0.5, 0.99).log(), "damping": uniform(0.05, 0.5)}
    parts |= {"rate": normal(H, D), "rate_bias": normal(H), "decay": normal(H, D), "decay_bias": 3 + normal(H)}
    for name in STATES:
        shape = (N, 4 + case.decay, H, D, D)
        parts[name] = normal(*shape) * D**-0.5 * (0.3 if name == "S" else 1.0)
        parts["d" + name] = normal(*shape)
    left_out = {"decay", "decay_bias"} if not case.decay else set()
    left_out |= {"log_momentum", "S", "dS"} if not case.momentum else set()
    left_out |= {"damping"} if not case.damped else set()
    left_out |= {"anchor"} if case.offsets is None else set()
    wide = torch.promote_types(dtype, torch.float32)
    types = {name: dtype if name in NARROW else wide for name in parts}
    return {name: part.to(device, types[name]) for name, part in parts.items() if name not in left_out}


def called(case: Case, given: Tensors, **named: Any) -> tuple[Tensor, SelfModifyingState]:
    """The operation's answer to a problem."""
    offset = None
    if case.offsets is not None:
        offset = torch.tensor(case.offsets, dtype=torch.int32, device=given["x"].device)
    tokens: Any = [given.get(name) for name in TOKENWISE]
    read: Any = [given.get(name) for name in READ]
    state: Any = [given.get(name) for name in STATES]
    named = case.arguments(given["x"].device) | {"state": SelfModifyingState(*state, offset)} | named
    return self_modifying(Inputs(*tokens), Readouts(*read), **named)


def solved(given: Tensors, function: Callable[[Tensors], tuple[Tensor, SelfModifyingState]]) -> Tensors:
    """o, W, S, anchor and offset behind the last token, and all gradients; `function` computes of leaves."""
    leaves = {n: given[n].detach().requires_grad_() for n in (*TOKENWISE, *READ, *STATES) if n in given}
    o, end = function(given | leaves)
    # A closed chunk has no anchor, or one that nobody reads: neither its value nor its gradient counts.
    offset = torch.zeros(len(end.W), dtype=torch.int32, device=end.W.device) if end.offset is None else end.offset
    inside = (offset > 0)[:, None, None, None, None]
    outputs = {"o": o, "W": end.W, "S": end.S, "anchor": (end.W if end.anchor is None else end.anchor) * inside}
    flowing = {name: given["d" + name].to(part.dtype) for name, part in outputs.items() if part is not None}
    found = torch.autograd.grad(
        [outputs[name] for name in flowing], list(leaves.values()), list(flowing.values()), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    gradients = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {name: outputs[name].detach() for name in flowing} | gradients | {"offset": offset}


def by(case: Case, given: Tensors, backend: str) -> Tensors:
    """The solution of one backend."""
    return solved(given, lambda leaves: called(case, leaves, backend=backend))


def definition(
    case: Case, given: Tensors, form: Callable[..., Any] = recurrent, dtype: torch.dtype = torch.float64
) -> Tensors:
    """The solution of the token loop in fp64, one sequence after another, or of another `form` of the reference."""
    count = len(given["W"])
    offsets, lengths = case.offsets or (0,) * count, case.lengths

    def each(leaves: Tensors) -> tuple[Tensor, SelfModifyingState]:
        if "log_momentum" in leaves:
            leaves = leaves | {"log_momentum": leaves["log_momentum"].clamp(min=LOWEST_GATE)}
        outputs, ends, start = [], [], 0
        read: Any = [leaves.get(name) for name in READ]
        for n in range(count):
            rows, stop = (slice(n, n + 1), None) if lengths is None else (slice(None), start + lengths[n])
            tokens: Any = [leaves[name][rows, start:stop] if name in leaves else None for name in TOKENWISE]
            state: Any = [leaves[name][n : n + 1] if name in leaves else None for name in STATES]
            o, end = form(
                Inputs(*tokens), Readouts(*read), rule=case.rule, chunk=case.chunk, state=SelfModifyingState(*state),
                offset=offsets[n],
            )  # fmt: skip
            if end.offset is None:
                end = end._replace(anchor=end.W, offset=torch.zeros(1, dtype=torch.int32, device=o.device))
            outputs.append(o)
            ends.append(end)
            start = start if lengths is None else start + lengths[n]
        parts: Any = [None if own[0] is None else torch.cat(own) for own in zip(*ends)]
        return torch.cat(outputs, 0 if lengths is None else 1), SelfModifyingState(*parts)

    return solved({name: part.to(dtype) for name, part in given.items()}, each)


def assert_close(found: Tensors, expected: Tensors, *, forward: float, backward: float) -> None:
    """Fails with all names that are further apart than allowed."""
    allowed = {name: forward for name in ("o", *STATES)} | {"offset": 0.0}
    errors = distances(found, expected)
    # Written so that NaN fails.
    wrong = {name: error for name, error in errors.items() if not error <= allowed.get(name, backward)}
    assert not wrong, f"relative errors too large: {wrong}; all: {errors}"
