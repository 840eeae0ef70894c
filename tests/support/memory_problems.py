"""What problems for `delta_memory` and `mlp_memory` have in common: sizes, random numbers, solutions, distances.

Names in problems: the arguments' own, and `do`, `dW`, … for what flows back into outputs. In solutions `d` before an
argument's name is its gradient. A memory's state is W, S and the anchor of each layer, then the offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.delta_memory.reference import LOWEST_GATE, Inputs

TOKENWISE = ("q", "k", "v", "rate", "log_decay", "log_momentum")
NARROW = ("q", "k", "v", "do")
"""What comes in the values' own type; everything else is fp32 or wider."""

FORWARD, BACKWARD = 2e-6, 1e-5
"""How far fp32 may be from fp64."""

Tensors = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a problem; `lengths` packs sequences into one row, `offsets` continues open chunks of each."""

    tokens: int = 18
    chunk: int = 16
    D: int = 16
    E: int = 16
    batch: int = 1
    heads: int = 1
    decay: bool = True
    momentum: bool = True
    lengths: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.tokens if self.lengths is None else sum(self.lengths)

    @property
    def sequences(self) -> int:
        """States of a problem."""
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def bounds(self) -> list[int] | None:
        """Where the packed sequences begin and end."""
        return None if self.lengths is None else [sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)]

    def packing(self, device: str | torch.device) -> Tensor | None:
        """The bounds as `cu_seqlens`."""
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=device)

    @property
    def form(self) -> dict[str, Any]:
        """What the reference's forms are told beside sizes."""
        raise TypeError(f"{type(self).__name__} must define form")

    @property
    def anchored(self) -> bool:
        """Whether the anchor of an end state means anything."""
        return True

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The operation's arguments that are not tensors of a problem, but for the state's offset."""
        raise TypeError(f"{type(self).__name__} must define arguments")


class Draws:
    """The random numbers of a problem, the same on every device."""

    def __init__(self, gates: tuple[int, ...]) -> None:
        self.source, self.gates = torch.Generator().manual_seed(0), gates

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.source, dtype=torch.float64)

    def uniform(self, low: float, high: float) -> Tensor:
        """One number a gate."""
        return low + (high - low) * torch.rand(self.gates, generator=self.source, dtype=torch.float64)


def given_out(case: Sizes, parts: Tensors, dtype: torch.dtype, device: str | torch.device) -> Tensors:
    """Those parts that the case has, in their types."""
    left_out = set() if case.decay else {"log_decay"}
    if not case.momentum:
        left_out |= {"log_momentum"} | {name for name in parts if name.removeprefix("d").startswith("S")}
    if case.offsets is None:
        left_out |= {name for name in parts if name.startswith("anchor")}
    wide = torch.promote_types(dtype, torch.float32)
    types = {name: dtype if name in NARROW else wide for name in parts}
    return {name: part.to(device, types[name]) for name, part in parts.items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class Problems:
    """An operation and what computes its problems: `states` names the parts of a `state`, `recurrent` is the token
    loop, `problem` draws."""

    operation: Function
    state: Callable[..., Any]
    states: tuple[str, ...]
    recurrent: Function
    problem: Callable[..., Tensors]

    def __str__(self) -> str:
        return self.operation.__name__

    def state_of(self, case: Sizes, given: Tensors) -> Any:
        """Where a problem's memory begins, with the tokens of its open chunk that every sequence has behind it."""
        offset = None
        if case.offsets is not None:
            offset = torch.tensor(case.offsets, dtype=torch.int32, device=given["v"].device)
        return self.state(*(given.get(name) for name in self.states), offset)

    def called(self, case: Sizes, given: Tensors, **named: Any) -> tuple[Tensor, Any]:
        """The operation of a problem."""
        tokens = [given.get(name) for name in TOKENWISE]
        arguments = case.arguments(given["v"].device) | {"state": self.state_of(case, given)}
        return self.operation(*tokens, **arguments | named)

    def solved(self, case: Sizes, given: Tensors, function: Function) -> Tensors:
        """o, the state's parts and offset behind the last token, and all gradients; `function(inputs, state)`
        computes."""
        leaves = {n: given[n].detach().requires_grad_() for n in (*TOKENWISE, *self.states) if n in given}
        inputs = Inputs(*(leaves.get(name) for name in TOKENWISE))  # type: ignore[arg-type]
        o, end = function(inputs, self.state_of(case, given | leaves))
        layers = len(self.states) // 3
        weights, momenta, anchors = (end[n * layers : (n + 1) * layers] for n in range(3))
        # A closed chunk has no anchor, or one that nobody reads: neither its value nor its gradient counts.
        none = torch.zeros(len(weights[0]), dtype=torch.int32, device=weights[0].device)
        offset = none if end.offset is None else end.offset
        inside = (offset > 0)[:, None, None, None]
        anchors = [(W if anchor is None else anchor) * inside for W, anchor in zip(weights, anchors, strict=True)]
        parts = (*weights, *momenta, *(anchors if case.anchored else [None] * layers))
        outputs = {name: part for name, part in zip(("o", *self.states), (o, *parts), strict=True) if part is not None}
        flowing = [given["d" + name].to(part.dtype) for name, part in outputs.items()]
        found = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), flowing, allow_unused=True, materialize_grads=True
        )
        gradients = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
        return {name: part.detach() for name, part in outputs.items()} | gradients | {"offset": offset}

    def by(self, case: Sizes, given: Tensors, backend: str) -> Tensors:
        """The solution of one backend."""
        arguments = case.arguments(given["v"].device) | {"backend": backend}
        return self.solved(case, given, lambda inputs, state: self.operation(*inputs, state=state, **arguments))

    def agrees(self, case: Sizes, backend: str, given: Tensors | None = None) -> Tensors:
        """The solution of a backend, after it was found to be the definition's to rounding of fp32."""
        given = self.problem(case) if given is None else given
        found = self.by(case, given, backend)
        self.assert_close(found, self.definition(case, given), forward=FORWARD, backward=BACKWARD)
        return found

    def differentiable(self, case: Sizes, backend: str) -> bool:
        """`gradcheck` of outputs and end states in one random direction of all inputs together."""
        given = self.problem(case, torch.float64)
        names = [name for name in (*TOKENWISE, *self.states) if name in given]

        def flat(numbers: Tensor) -> Tensor:
            split = numbers.split([given[name].numel() for name in names])
            parts = {name: part.view_as(given[name]) for name, part in zip(names, split, strict=True)}
            o, end = self.called(case, given | parts, backend=backend)
            return torch.cat([part.flatten() for part in (o, *end[:-1]) if part is not None])

        start = torch.cat([given[name].flatten() for name in names]).requires_grad_()
        return torch.autograd.gradcheck(flat, start, fast_mode=True)

    def read(self, case: Sizes, given: Tensors, backend: str) -> Tensor:
        """The outputs of one backend alone."""
        with torch.no_grad():
            return self.called(case, given, backend=backend)[0]

    def definition(
        self, case: Sizes, given: Tensors, form: Function | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensors:
        """The solution of the token loop in fp64, one sequence after another, or of another `form` of the
        reference."""
        form = form or self.recurrent

        def each(inputs: Inputs, state: Any) -> tuple[Tensor, Any]:
            gates = (None if gate is None else gate.clamp(min=LOWEST_GATE) for gate in inputs[4:])
            inputs = Inputs(*inputs[:4], *gates)
            found = [
                form(own, chunk=case.chunk, state=row, offset=offset, **case.form)
                for own, row, offset in self._sequences(case, inputs, state)
            ]
            ends = [self._closed(end) for _, end in found]
            parts = [None if own[0] is None else torch.cat(own) for own in zip(*ends, strict=True)]
            return torch.cat([o for o, _ in found], 0 if case.lengths is None else 1), self.state(*parts)

        return self.solved(case, {name: part.to(dtype) for name, part in given.items()}, each)

    def _closed(self, end: Any) -> Any:
        """An end state with all of its parts, for sequences of which only some have a chunk open."""
        layers = len(self.states) // 3
        anchors = zip(end[:layers], end[2 * layers : 3 * layers], strict=True)
        offset = torch.zeros(1, dtype=torch.int32, device=end[0].device) if end.offset is None else end.offset
        return self.state(*end[: 2 * layers], *(W if anchor is None else anchor for W, anchor in anchors), offset)

    def _sequences(self, case: Sizes, inputs: Inputs, state: Any) -> Iterator[tuple[Inputs, Any, int]]:
        for n in range(len(state[0])):
            row = self.state(*(None if part is None else part[n : n + 1] for part in state[:-1]))
            if case.bounds is None:
                own = Inputs(*(None if part is None else part[n : n + 1] for part in inputs))  # type: ignore[arg-type]
            else:
                own = inputs.tokens(case.bounds[n], case.bounds[n + 1])
            yield own, row, 0 if case.offsets is None else case.offsets[n]

    def assert_close(
        self, found: Tensors, expected: Tensors, *, forward: float, backward: float, gates: float = 0.0,
        rounded: Tensors | None = None,
    ) -> None:  # fmt: skip
        """Fails with all names that are further apart than allowed; gates' gradients may be given a bound of their own,
        and states may be as far off as those of plain PyTorch with `rounded` products."""
        allowed = {name: forward for name in ("o", *self.states)} | {"offset": 0.0}
        allowed |= {f"d{name}": max(gates, backward) for name in ("rate", "log_decay", "log_momentum")}
        for name, error in ({} if rounded is None else distances(rounded, expected)).items():
            if name in self.states:
                allowed[name] = max(forward, error)
        errors = distances(found, expected)
        # Written so that NaN fails.
        wrong = {name: error for name, error in errors.items() if not error <= allowed.get(name, backward)}
        assert not wrong, f"relative errors too large: {wrong}; all: {errors}"


def distances(found: Tensors, expected: Tensors) -> dict[str, float]:
    """Relative error of everything, in the Frobenius norm; NaN where anything is NaN."""
    assert found.keys() == expected.keys()
    pairs = {name: (found[name].double(), expected[name].double()) for name in expected}
    return {name: float((one - other).norm() / other.norm().clamp(min=1e-6)) for name, (one, other) in pairs.items()}


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
