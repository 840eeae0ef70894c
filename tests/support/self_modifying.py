"""Self-modifying memories, problems for them, and solutions: answers, end states and all outer gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clplat.architectures.associative_memory.rule import BiasOptions, NetworkOptions
from clplat.architectures.associative_memory.state import MemoryState
from clplat.architectures.hope.inputs import HeadInputs
from clplat.architectures.hope.memory import SelfModifyingMemory
from clplat.architectures.hope.options import SelfModifyingOptions

MATRIX = NetworkOptions()
MLP = NetworkOptions(depth=2, expand=2, residual=True)

OPTIONS = {
    "hope": SelfModifyingOptions(network=MLP, chunk=4, generator_chunk=4),
    "shared inputs": SelfModifyingOptions(network=MLP, inputs="shared", chunk=4, generator_chunk=2),
    "matrix, shared inputs": SelfModifyingOptions(network=MATRIX, inputs="shared", chunk=4, generator_chunk=4),
    "two chunks": SelfModifyingOptions(network=MLP, chunk=2, generator_chunk=4),
    "two chunks, the other way": SelfModifyingOptions(network=MLP, chunk=4, generator_chunk=2, momentum=False),
    "matrix": SelfModifyingOptions(
        network=MATRIX, momentum=False, chunk=4, generator_chunk=4, unit_values=False, max_gradient=0.3
    ),
    "matrix, values as targets": SelfModifyingOptions(network=MATRIX, target="value", chunk=4, generator_chunk=4),
    "matrix, token by token": SelfModifyingOptions(network=MATRIX, chunk=1, generator_chunk=1, delta="single"),
    "single": SelfModifyingOptions(network=MLP, delta="single", chunk=4, generator_chunk=4, read="after"),
    "dot": SelfModifyingOptions(network=MATRIX, bias=BiasOptions(kind="dot"), chunk=4, generator_chunk=2),
    "without delta": SelfModifyingOptions(network=MLP, delta="none", chunk=4, generator_chunk=4, damped=False),
    "without decay": SelfModifyingOptions(network=MLP, decay=False, chunk=4, generator_chunk=4, delta_on="last"),
    "without inner key": SelfModifyingOptions(
        network=MLP, generated=("value", "rate", "decay"), chunk=4, generator_chunk=4, max_gradient=None
    ),
    "without inner value": SelfModifyingOptions(
        network=MLP, generated=("key", "rate", "decay"), chunk=2, generator_chunk=4, read="chunk_start"
    ),
    "query too": SelfModifyingOptions(
        network=MATRIX, generated=("query", "key", "value"), chunk=4, generator_chunk=4, delta_on="first"
    ),
    "nothing made": SelfModifyingOptions(network=MLP, generated=(), target="value", chunk=4, generator_chunk=3 * 4),
    "three layers": SelfModifyingOptions(
        network=NetworkOptions(depth=3, expand=1, activation="silu", residual=True), chunk=2, generator_chunk=2
    ),
}  # fmt: skip

ROWS, HEADS, WIDTH = 3, 2, 4


def memory(options: SelfModifyingOptions) -> SelfModifyingMemory:
    """A memory in float64 whose trained start is no longer the one it is born with."""
    torch.manual_seed(0)
    made = SelfModifyingMemory(options=options, num_heads=HEADS, head_size=WIDTH).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs(options: SelfModifyingOptions, length: int, *, seed: int = 0) -> HeadInputs:
    """Random tokens and what is not made by memories, as leaves."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*more: int) -> Tensor:
        drawn = torch.randn(ROWS, HEADS, length, *more, generator=draw, dtype=torch.float64)
        return drawn.requires_grad_()

    made = options.generators
    return HeadInputs(
        x=normal(WIDTH) if options.inputs == "shared" or not made else normal(len(made), WIDTH),
        query=None if "query" in made else normal(WIDTH),
        key=None if "key" in made else normal(WIDTH),
        value=None if "value" in made else normal(WIDTH),
        rate=None if "rate" in made else normal(),
        decay=None if "decay" in made or not options.decay else normal(),
        momentum=normal() if options.momentum else None,
    )


def solution(
    made: SelfModifyingMemory, given: HeadInputs, solve: Callable[[], tuple[Tensor, MemoryState | None]],
    start: MemoryState | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Answers, end state and the gradients that a random outer loss of both sends to all inputs and parameters."""
    answers, end = solve()
    found = {"answers": answers}
    if end is not None:
        for name in ("weights", "momentum", "anchor"):
            found |= {f"{name}.{layer}": part for layer, part in enumerate(getattr(end, name))}
    draw = torch.Generator().manual_seed(7)
    outer = sum((part * torch.randn(part.shape, generator=draw, dtype=part.dtype)).sum() for part in found.values())
    named = dict(made.named_parameters())
    named |= {name: part for name, part in given._asdict().items() if part is not None and part.requires_grad}
    if start is not None:
        named |= {f"start.{n}": part for n, part in enumerate((*start.weights, *start.momentum, *start.anchor))}
    gradients = torch.autograd.grad(outer, list(named.values()), allow_unused=True, materialize_grads=True)
    found |= {f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    if end is not None:
        found["offset"] = end.offset
    return {name: part.detach() for name, part in found.items()}
