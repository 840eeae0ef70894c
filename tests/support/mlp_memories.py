"""Problems for `mlp_memory` and their solutions: outputs, end states and the gradient of every input by name.

Names in problems: the arguments' own, and `do`, `dW1`, `dS2`, … for what flows back into outputs. In solutions `d`
before an argument's name is its gradient. Shapes: see `clplat.kernels.mlp_memory.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from delta_memories import NARROW, TOKENWISE, Tensors, distances
from torch import Tensor

from clplat.kernels.delta_memory.reference import LOWEST_GATE, Inputs
from clplat.kernels.mlp_memory import MLPState, Rule, mlp_memory
from clplat.kernels.mlp_memory.reference import Activation, Bias, recurrent

STATES = ("W1", "W2", "S1", "S2", "anchor1", "anchor2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a problem; `lengths` packs sequences into one row, `offsets` continues open chunks of each."""

    tokens: int = 18
    chunk: int = 16
    D: int = 16
    E: int = 16
    inner: int = 32
    batch: int = 1
    heads: int = 1
    activation: Activation = "silu"
    bias: Bias = "l2"
    residual: bool = True
    decay: bool = True
    momentum: bool = True
    lengths: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None

    def __str__(self) -> str:
        gates = "+residual" * self.residual + "+decay" * self.decay + "+momentum" * self.momentum
        sizes = f"T{self.tokens}-C{self.chunk}-D{self.D}-I{self.inner}-E{self.E}-B{self.batch}-H{self.heads}"
        packed = "-packed" * bool(self.lengths) + "-offsets" * bool(self.offsets)
        return f"{self.activation}-{self.bias}{gates}-{sizes}{packed}"

    @property
    def rule(self) -> Rule:
        return Rule(activation=self.activation, bias=self.bias, residual=self.residual)

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The arguments of `mlp_memory` that are not tensors of a problem, but for the state's offset."""
        found: dict[str, Any] = {"activation": self.activation, "bias": self.bias, "residual": self.residual}
        if self.lengths is not None:
            ends = [sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)]
            found["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
        return found | {"chunk": self.chunk}


def problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensors:
    """Random inputs and cotangents, the same numbers on every device; unit keys and small steps, so that no memory
    diverges."""
    draw = torch.Generator().manual_seed(0)
    T = case.tokens if case.lengths is None else sum(case.lengths)
    N = case.batch if case.lengths is None else len(case.lengths)
    gates = (case.batch, T, case.heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(gates, generator=draw, dtype=torch.float64)

    unit = torch.nn.functional.normalize(normal(*gates, case.D), dim=-1)
    parts = {"q": normal(*gates, case.D), "k": unit, "v": normal(*gates, case.E), "do": normal(*gates, case.E)}
    # All tokens of a chunk correct the same error: together they must not overshoot.
    parts["rate"] = uniform(0.3, 3.0) / case.chunk
    # Sums of a chunk's log gates stay small enough that fp32 keeps six digits of their differences.
    parts["log_decay"], parts["log_momentum"] = -(uniform(0, 1) ** 4), uniform(0.5, 0.99).log()
    for name in STATES:
        shape = (case.D, case.inner) if name.endswith("1") else (case.inner, case.E)
        scale = shape[0] ** -0.5 * (0.3 if name.startswith("S") else 1.0)
        parts[name], parts["d" + name] = scale * normal(N, case.heads, *shape), normal(N, case.heads, *shape)
    left_out = {"log_decay"} if not case.decay else set()
    left_out |= {"log_momentum", "S1", "S2", "dS1", "dS2"} if not case.momentum else set()
    left_out |= {"anchor1", "anchor2"} if case.offsets is None else set()
    wide = torch.promote_types(dtype, torch.float32)
    types = {name: dtype if name in NARROW else wide for name in parts}
    return {name: part.to(device, types[name]) for name, part in parts.items() if name not in left_out}


def state_of(case: Case, given: Tensors) -> MLPState:
    """Where a problem's memory begins."""
    offset = None
    if case.offsets is not None:
        offset = torch.tensor(case.offsets, dtype=torch.int32, device=given["v"].device)
    return MLPState(*(given.get(name) for name in STATES), offset)  # type: ignore[arg-type]


def solved(case: Case, given: Tensors, function: Callable[..., tuple[Tensor, MLPState]]) -> Tensors:
    """o, both layers' parts and the offset behind the last token, and all gradients; `function(inputs, state)`."""
    leaves = {name: given[name].detach().requires_grad_() for name in (*TOKENWISE, *STATES) if name in given}
    inputs = Inputs(*(leaves.get(name) for name in TOKENWISE))  # type: ignore[arg-type]
    o, end = function(inputs, state_of(case, given | leaves))
    # A closed chunk has no anchor, or one that nobody reads: neither its value nor its gradient counts.
    offset = torch.zeros(len(end.W1), dtype=torch.int32, device=end.W1.device) if end.offset is None else end.offset
    anchor = end.weights if end.anchor is None else end.anchor
    inside = (offset > 0)[:, None, None, None]
    outputs = {"o": o, "W1": end.W1, "W2": end.W2, "S1": end.S1, "S2": end.S2}
    outputs |= {"anchor1": anchor[0] * inside, "anchor2": anchor[1] * inside}
    outputs = {name: part for name, part in outputs.items() if part is not None}
    flowing = [given["d" + name].to(part.dtype) for name, part in outputs.items()]
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), flowing, allow_unused=True, materialize_grads=True
    )
    gradients = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {name: part.detach() for name, part in outputs.items()} | gradients | {"offset": offset}


def by(case: Case, given: Tensors, backend: str) -> Tensors:
    """The solution of one backend."""
    arguments = case.arguments(given["v"].device)
    return solved(case, given, lambda inputs, state: mlp_memory(*inputs, state=state, backend=backend, **arguments))  # type: ignore[arg-type]


def read(case: Case, given: Tensors, backend: str) -> Tensor:
    """The outputs of one backend alone."""
    tokens: Any = [given.get(name) for name in TOKENWISE]
    arguments = case.arguments(given["v"].device)
    with torch.no_grad():
        return mlp_memory(*tokens, state=state_of(case, given), backend=backend, **arguments)[0]  # type: ignore[arg-type]


def definition(
    case: Case,
    given: Tensors,
    form: Callable[..., tuple[Tensor, MLPState]] = recurrent,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """The solution of the token loop in fp64, one sequence after another, or of another `form` of the reference."""

    def each(inputs: Inputs, state: MLPState) -> tuple[Tensor, MLPState]:
        inputs = Inputs(*inputs[:4], *(None if gate is None else gate.clamp(min=LOWEST_GATE) for gate in inputs[4:]))
        outputs, ends, start = [], [], 0
        for n in range(len(state.W1)):
            own = Inputs(*(None if part is None else part[n : n + 1] for part in inputs))
            if case.lengths is not None:
                own = inputs.tokens(start, start + case.lengths[n])
                start += case.lengths[n]
            row = MLPState(*(None if part is None else part[n : n + 1] for part in state[:6]))  # type: ignore[arg-type]
            offset = 0 if case.offsets is None else case.offsets[n]
            o, end = form(own, rule=case.rule, chunk=case.chunk, state=row, offset=offset)
            if end.offset is None:
                zero = torch.zeros(1, dtype=torch.int32, device=o.device)
                end = end._replace(anchor1=end.W1, anchor2=end.W2, offset=zero)
            outputs.append(o)
            ends.append(end)
        parts = [None if own[0] is None else torch.cat(own) for own in zip(*ends)]
        return torch.cat(outputs, 0 if case.lengths is None else 1), MLPState(*parts)  # type: ignore[arg-type]

    return solved(case, {name: part.to(dtype) for name, part in given.items()}, each)


def assert_close(
    found: Tensors,
    expected: Tensors,
    *,
    forward: float,
    backward: float,
    gates: float = 0.0,
    rounded: Tensors | None = None,
) -> None:
    """Fails with all names that are further apart than allowed; gates' gradients may be given a bound of their own, and
    states may be as far off as those of plain PyTorch with `rounded` products."""
    allowed = {name: forward for name in ("o", *STATES)} | {"offset": 0.0}
    allowed |= {f"d{name}": max(gates, backward) for name in ("rate", "log_decay", "log_momentum")}
    if rounded is not None:
        allowed |= {name: max(forward, error) for name, error in distances(rounded, expected).items() if name in STATES}
    errors = distances(found, expected)
    # Written so that NaN fails.
    wrong = {name: error for name, error in errors.items() if not error <= allowed.get(name, backward)}
    assert not wrong, f"relative errors too large: {wrong}; all: {errors}"
