"""Problems for `delta_memory` and their solutions: outputs, end states and the gradient of every input by name.

Names in problems: the arguments' own, and `do`, `dW`, `dS`, `danchor` for what flows back into outputs. In solutions
`d` before an argument's name is its gradient. Shapes: see `clplat.kernels.delta_memory.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.delta_memory import MemoryState, Mode, delta_memory
from clplat.kernels.delta_memory.reference import LOWEST_GATE, Inputs, recurrent

TOKENWISE = ("q", "k", "v", "rate", "log_decay", "log_momentum")
STATES = ("W", "S", "anchor")
NARROW = ("q", "k", "v", "do")
"""What comes in the values' own type; everything else is fp32 or wider."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a problem; `lengths` packs sequences into one row, `offsets` continues open chunks of each."""

    mode: Mode
    tokens: int = 18
    chunk: int = 16
    D: int = 16
    E: int = 16
    batch: int = 1
    heads: int = 1
    group: int = 1
    decay: bool = True
    momentum: bool = True
    lengths: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None

    def __str__(self) -> str:
        gates = "+decay" * self.decay + "+momentum" * self.momentum
        sizes = f"T{self.tokens}-C{self.chunk}-D{self.D}-E{self.E}-B{self.batch}-H{self.heads}x{self.group}"
        return f"{self.mode}{gates}-{sizes}" + "-packed" * bool(self.lengths) + "-offsets" * bool(self.offsets)

    @property
    def bounds(self) -> list[int] | None:
        """Where the packed sequences begin and end."""
        return None if self.lengths is None else [sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)]

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The arguments of `delta_memory` that are not tensors of a problem, but for the state's offset."""
        bounds = None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=device)
        return {"mode": self.mode, "chunk": self.chunk, "cu_seqlens": bounds}


def problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensors:
    """Random inputs and cotangents, the same numbers on every device; unit keys, so that no mode diverges."""
    draw = torch.Generator().manual_seed(0)
    T = case.tokens if case.lengths is None else sum(case.lengths)
    N = case.batch if case.lengths is None else len(case.lengths)
    V = case.heads * case.group
    keys, values, gates = (case.batch, T, case.heads, case.D), (case.batch, T, V, case.E), (case.batch, T, V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(gates, generator=draw, dtype=torch.float64)

    unit = torch.nn.functional.normalize(normal(*keys), dim=-1)
    parts = {"q": normal(*keys), "k": unit, "v": normal(*values), "do": normal(*values)}
    # All tokens of a frozen chunk correct the same error: together they must not overshoot.
    parts["rate"] = uniform(0.02, 0.2) if case.mode == "frozen" else uniform(0.05, 1.0)
    parts["log_decay"], parts["log_momentum"] = -(uniform(0, 1.6) ** 4), uniform(0.5, 0.99).log()
    for name in STATES:
        parts[name], parts["d" + name] = normal(N, V, case.D, case.E), normal(N, V, case.D, case.E)
    left_out = {"log_decay"} if not case.decay else set()
    left_out |= {"log_momentum", "S", "dS"} if not case.momentum else set()
    left_out |= {"anchor"} if case.offsets is None else set()
    wide = torch.promote_types(dtype, torch.float32)
    types = {name: dtype if name in NARROW else wide for name in parts}
    return {name: part.to(device, types[name]) for name, part in parts.items() if name not in left_out}


def offsets_of(case: Case, device: str | torch.device = "cpu") -> Tensor | None:
    """Tokens of its open chunk that every sequence has behind it."""
    return None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32, device=device)


def solved(case: Case, given: Tensors, function: Callable[..., tuple[Tensor, MemoryState]]) -> Tensors:
    """o, W, S, anchor and offset behind the last token, and all gradients; `function(inputs, state)` computes."""
    leaves = {name: given[name].detach().requires_grad_() for name in (*TOKENWISE, *STATES) if name in given}
    inputs = Inputs(*(leaves.get(name) for name in TOKENWISE))  # type: ignore[arg-type]
    o, end = function(inputs, MemoryState(*(leaves.get(n) for n in STATES), offsets_of(case, given["v"].device)))  # type: ignore[arg-type]
    # A closed chunk has no anchor, or one that nobody reads: neither its value nor its gradient counts.
    offset = torch.zeros(len(end.W), dtype=torch.int32).to(end.W.device) if end.offset is None else end.offset
    anchor = (end.W if end.anchor is None else end.anchor) * (offset > 0)[:, None, None, None]
    outputs = {"o": o, "W": end.W, "S": end.S, "anchor": anchor if case.mode == "frozen" else None}
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
    return solved(case, given, lambda inputs, state: delta_memory(*inputs, state=state, backend=backend, **arguments))  # type: ignore[arg-type]


def read(case: Case, given: Tensors, backend: str) -> Tensor:
    """The outputs of one backend alone."""
    tokens = (given.get(name) for name in TOKENWISE)
    state = MemoryState(*(given.get(name) for name in STATES), offsets_of(case, given["v"].device))  # type: ignore[arg-type]
    with torch.no_grad():
        return delta_memory(*tokens, state=state, backend=backend, **case.arguments(given["v"].device))[0]  # type: ignore[arg-type]


def definition(case: Case, given: Tensors, form: Callable[..., tuple[Tensor, MemoryState]] = recurrent) -> Tensors:
    """The solution of the token loop in fp64, one sequence after another, or of another `form` of the reference."""

    def each(inputs: Inputs, state: MemoryState) -> tuple[Tensor, MemoryState]:
        gates = (None if gate is None else gate.clamp(min=LOWEST_GATE) for gate in inputs[4:])
        inputs = Inputs(*inputs[:4], *gates)
        found = [
            form(own, mode=case.mode, chunk=case.chunk, state=row, offset=offset)
            for own, row, offset in _sequences(case, inputs, state)
        ]
        o = torch.cat([o for o, _ in found], 0 if case.lengths is None else 1)
        W, S = torch.cat([end.W for _, end in found]), None
        if state.S is not None:
            S = torch.cat([end.S for _, end in found if end.S is not None])
        anchor = torch.cat([end.W if end.anchor is None else end.anchor for _, end in found])
        offset = torch.cat([o.new_zeros(1).int() if end.offset is None else end.offset for _, end in found])
        return o, MemoryState(W, S, anchor, offset)

    return solved(case, {name: part.double() for name, part in given.items()}, each)


def _sequences(case: Case, inputs: Inputs, state: MemoryState) -> Iterator[tuple[Inputs, MemoryState, int]]:
    for n in range(len(state.W)):
        row = MemoryState(*(None if part is None else part[n : n + 1] for part in state[:3]))
        offset = 0 if case.offsets is None else case.offsets[n]
        if case.bounds is None:
            own = Inputs(*(None if part is None else part[n : n + 1] for part in inputs))
        else:
            own = inputs.tokens(case.bounds[n], case.bounds[n + 1])
        yield own, row, offset


def distances(found: Tensors, expected: Tensors) -> dict[str, float]:
    """Relative error of everything, in the Frobenius norm; NaN where anything is NaN."""
    assert found.keys() == expected.keys()
    pairs = {name: (found[name].double(), expected[name].double()) for name in expected}
    return {name: float((one - other).norm() / other.norm().clamp(min=1e-6)) for name, (one, other) in pairs.items()}


def assert_close(found: Tensors, expected: Tensors, *, forward: float, backward: float, gates: float = 0.0) -> None:
    """Fails with all names that are further apart than allowed; gates' gradients may be given a bound of their own."""
    allowed = {name: forward for name in ("o", *STATES)} | {"offset": 0.0}
    allowed |= {f"d{name}": max(gates, backward) for name in ("rate", "log_decay", "log_momentum")}
    errors = distances(found, expected)
    # Written so that NaN fails.
    wrong = {name: error for name, error in errors.items() if not error <= allowed.get(name, backward)}
    assert not wrong, f"relative errors too large: {wrong}; all: {errors}"


def covering(together: Sequence[str], **factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Few combinations in which every two levels of two factors meet, and all levels of the factors `together`."""

    def meetings(levels: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        named = tuple(zip(factors, levels))
        return {*combinations(named, 2), tuple(pair for pair in named if pair[0] in together)}

    candidates = {levels: meetings(levels) for levels in product(*factors.values())}
    missing, chosen = set().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda levels: len(candidates[levels] & missing))
        chosen.append(dict(zip(factors, best)))
        missing -= candidates[best]
    return chosen
