"""Rules of associative memories, problems for them, and solutions: answers, end states and all outer gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clplat.architectures.associative_memory.layout import Documents, documents_of
from clplat.architectures.associative_memory.maps import MapOptions
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.rule import BiasOptions, MemoryRule, NetworkOptions, PolynomialOptions
from clplat.architectures.associative_memory.state import MemoryState, Tokens

MLP = NetworkOptions(depth=2, expand=2)
TTT = NetworkOptions(depth=2, expand=2, residual=True, norm=True)
SWIGLU = NetworkOptions(kind="swiglu", depth=2, expand=2, activation="silu")

RULES = {
    "hebb": MemoryRule(bias=BiasOptions(kind="dot"), retention="decay", chunk=4),
    "frozen": MemoryRule(retention="decay", chunk=4),
    "titans-matrix": MemoryRule(retention="decay", optimizer="momentum", chunk=4),
    "exact": MemoryRule(gradient_at="token", optimizer="momentum", chunk=4),
    "gdn": MemoryRule(gradient_at="decayed", retention="decay", chunk=4),
    "gdn-channel": MemoryRule(gradient_at="decayed", retention="channel", optimizer="momentum", chunk=4),
    "exact-channel": MemoryRule(gradient_at="token", retention="channel", chunk=4),
    "titans-channel": MemoryRule(retention="channel", optimizer="momentum", chunk=4),
    "ttt-linear": MemoryRule(memory=NetworkOptions(norm=True, residual=True), feature="identity", chunk=4),
    "self-target": MemoryRule(target="self", retention="decay", chunk=4),
    "lp": MemoryRule(bias=BiasOptions(kind="lp", power=3.0), retention="decay", chunk=4),
    "huber": MemoryRule(bias=BiasOptions(kind="huber"), retention="channel", chunk=4),
    "mlp-titans": MemoryRule(memory=MLP, retention="decay", optimizer="momentum", chunk=4),
    "mlp-ttt": MemoryRule(memory=TTT, chunk=4),
    "mlp-dot": MemoryRule(memory=MLP, bias=BiasOptions(kind="dot"), retention="decay", chunk=4),
    "mlp-channel": MemoryRule(memory=MLP, retention="channel", optimizer="momentum", chunk=4),
    "mlp-deep": MemoryRule(
        memory=NetworkOptions(depth=3, expand=2, activation="silu", norm=True), bias=BiasOptions(kind="lp", power=1.5),
        retention="decay", optimizer="momentum", chunk=4, target="self", feature="elu",
    ),
    "hebb-read-first": MemoryRule(bias=BiasOptions(kind="dot"), retention="decay", chunk=4, read="chunk_start"),
    "gdn-read-first": MemoryRule(gradient_at="decayed", retention="channel", chunk=4, read="chunk_start"),
    "mlp-read-first": MemoryRule(memory=TTT, retention="decay", optimizer="momentum", chunk=4, read="chunk_start"),
    "huber-norm": MemoryRule(bias=BiasOptions(kind="huber", huber="norm"), chunk=4),
    "mlp-yaad": MemoryRule(
        memory=TTT, bias=BiasOptions(kind="huber", huber="switch"), retention="channel", chunk=4
    ),
    "lq": MemoryRule(map=MapOptions(kind="lq"), retention="decay", optimizer="momentum", chunk=4),
    "lq-read-first": MemoryRule(map=MapOptions(kind="lq", power=3.0), retention="channel", chunk=4, read="chunk_start"),
    "mlp-moneta": MemoryRule(
        memory=TTT, bias=BiasOptions(kind="lp", power=3.0), retention="channel", map=MapOptions(kind="lq"), chunk=4
    ),
    "mlp-moneta-each-token": MemoryRule(
        memory=TTT, bias=BiasOptions(kind="lp"), retention="decay", map=MapOptions(kind="lq"), chunk=1
    ),
    "kl": MemoryRule(map=MapOptions(kind="kl"), retention="decay", optimizer="momentum", chunk=4),
    "kl-hebb": MemoryRule(map=MapOptions(kind="kl"), bias=BiasOptions(kind="dot"), retention="decay", chunk=4),
    "mlp-memora": MemoryRule(memory=TTT, retention="channel", map=MapOptions(kind="kl"), chunk=4),
    "mlp-memora-positive-each-token": MemoryRule(
        memory=MLP, retention="decay", map=MapOptions(kind="kl", signs="positive", mass=2.0), chunk=1
    ),
    "mlp-weight-norm": MemoryRule(memory=MLP, optimizer="momentum", map=MapOptions(kind="norm"), chunk=4),
    "swiglu": MemoryRule(memory=SWIGLU, retention="decay", optimizer="momentum", chunk=4),
    "swiglu-lact": MemoryRule(
        memory=SWIGLU, bias=BiasOptions(kind="dot"), retention="channel", map=MapOptions(kind="norm"), chunk=4,
        read="chunk_start",
    ),
    "swiglu-norm": MemoryRule(
        memory=NetworkOptions(kind="swiglu", depth=2, expand=2, residual=True, norm=True), target="self",
        retention="channel", chunk=4,
    ),
    "mlp-huber-each-token": MemoryRule(memory=MLP, bias=BiasOptions(kind="huber"), optimizer="momentum", chunk=1),
    "delta-single": MemoryRule(delta="single", retention="decay", feature="identity", chunk=4),
    "delta-single-gdn": MemoryRule(delta="single", retention="decay", chunk=4),
    "delta-double": MemoryRule(delta="double", retention="decay", optimizer="momentum", chunk=4),
    "delta-single-channel": MemoryRule(delta="single", retention="channel", feature="elu", target="self", chunk=4),
    "swiglu-delta": MemoryRule(memory=SWIGLU, delta="double", delta_on="first", retention="decay", chunk=4),
    "delta-dot": MemoryRule(delta="double", bias=BiasOptions(kind="dot"), optimizer="momentum", chunk=4),
    "mlp-delta": MemoryRule(
        memory=NetworkOptions(depth=2, expand=2, residual=True), delta="double", retention="decay",
        optimizer="momentum", target="self", chunk=4,
    ),
    "mlp-delta-norm": MemoryRule(memory=TTT, delta="double", delta_on="first", retention="channel", chunk=4),
    "mlp-delta-single": MemoryRule(
        memory=NetworkOptions(depth=3, expand=2, activation="silu", residual=True), delta="single", delta_on="last",
        bias=BiasOptions(kind="huber"), chunk=4,
    ),
    "omega-memora": MemoryRule(memory=MLP, retention="decay", map=MapOptions(kind="kl"), window=3, chunk=4),
    "swiglu-lact-muon": MemoryRule(
        memory=SWIGLU, bias=BiasOptions(kind="dot"), optimizer="muon", retention="decay", map=MapOptions(kind="norm"),
        chunk=4, read="chunk_start",
    ),
    "swiglu-omega-muon": MemoryRule(memory=SWIGLU, optimizer="muon", map=MapOptions(kind="norm"), window=3, chunk=4),
    "omega": MemoryRule(retention="decay", window=3, chunk=4),
    "omega-hebb": MemoryRule(bias=BiasOptions(kind="dot"), retention="decay", window=3, chunk=4),
    "omega-titans": MemoryRule(retention="channel", optimizer="momentum", window=2, chunk=4),
    "omega-poly": MemoryRule(
        feature="poly", polynomial=PolynomialOptions(rank=3), retention="decay", window=4, chunk=4
    ),
    "omega-self": MemoryRule(target="self", window=6, chunk=3),
    "mlp-omega": MemoryRule(
        memory=TTT, bias=BiasOptions(kind="huber"), retention="decay", optimizer="momentum", window=7, chunk=4
    ),
    "mlp-omega-each-token": MemoryRule(memory=MLP, bias=BiasOptions(kind="lp"), window=3, chunk=1),
    "muon": MemoryRule(optimizer="muon", chunk=4),
    "muon-hebb": MemoryRule(bias=BiasOptions(kind="dot"), optimizer="muon", retention="decay", chunk=3),
    "mlp-muon-channel": MemoryRule(memory=MLP, optimizer="muon", retention="channel", chunk=4),
    "mlp-muon-each-token": MemoryRule(memory=TTT, optimizer="muon", retention="decay", chunk=1),
    "atlas": MemoryRule(
        memory=MLP, feature="taylor", polynomial=PolynomialOptions(degree=3, rank=2), optimizer="muon",
        retention="decay", window=6, chunk=4,
    ),
}  # fmt: skip
"""Every choice of every part, with each other part that it is computed together with."""

ROWS, HEADS, WIDTH = 3, 2, 5
LAYERED = ("weights", "momentum", "anchor", "window", "owed")
"""The parts of a state that are tuples of tensors."""


def memory(rule: MemoryRule, *, width: int = WIDTH, learned_start: bool = True) -> AssociativeMemory:
    """A memory in float64 whose trained start is no longer the one it is born with."""
    torch.manual_seed(0)
    made = AssociativeMemory(
        rule=rule, num_heads=HEADS, key_size=width, value_size=width, learned_start=learned_start
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def tokens(rule: MemoryRule, length: int, *, seed: int = 0, width: int = WIDTH) -> Tokens:
    """Random keys, values, queries and the gates that the rule has, as leaves."""
    draw = torch.Generator().manual_seed(seed)
    shape = (ROWS, HEADS, length)

    def normal(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=draw, dtype=torch.float64)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, *more, generator=draw, dtype=torch.float64)

    inputs = [inner for inner, _ in rule.widths(width, width)]
    together = uniform(0.5, 1.0, 1).log()
    decay = {
        "none": (),
        "decay": (together,) * len(inputs),
        "channel": tuple(uniform(0.5, 1.0, wide).log() for wide in inputs),
    }[rule.retention]
    momentum = uniform(0.3, 0.9).log() if rule.momentous else None
    threshold = uniform(0.3, 1.0) if rule.bias.kind == "huber" else None
    given = Tokens(normal(width), normal(width), normal(width), uniform(0.05, 0.3), decay, momentum, threshold)
    return leaves(given._replace(window=uniform(0.1, 1.0, rule.window) if rule.window > 1 else None))


def leaves(given: Tokens) -> Tokens:
    """The same numbers as tensors that gradients end at; gates that layers share stay shared."""
    own = {id(part): part.detach().clone().requires_grad_() for part in _tensors(given)}
    decay = tuple(own[id(gate)] for gate in given.log_decay)
    own_parts = (None if part is None else own[id(part)] for part in (*given[:4], *given[5:7], given.window))
    q, k, v, rate, momentum, threshold, window = own_parts
    return Tokens(q, k, v, rate, decay, momentum, threshold, given.counts, window=window)


def _tensors(given: Tokens) -> list[Tensor]:
    return [part for part in (*given[:4], *given.log_decay, *given[5:7], given.window) if part is not None]


def packed() -> Documents:
    """Documents of rows of 11 tokens: lengths 5, 1, 5; 11; 3, 8."""
    ids = torch.tensor([[0] * 5 + [1] + [2] * 5, [0] * 11, [7] * 3 + [2] * 8])
    found = documents_of(ids)
    assert found is not None
    return found


def layers_of(state: MemoryState) -> list[Tensor]:
    """All tensors of a state but the offset."""
    return [part for name in LAYERED for part in getattr(state, name)]


def solution(
    made: AssociativeMemory,
    given: Tokens,
    solve: Callable[[], tuple[Tensor, MemoryState | None]],
    start: MemoryState | None = None,
) -> dict[str, Tensor]:
    """Answers, end state and the gradients that a random outer loss of both sends to all inputs and parameters."""
    answers, end = solve()
    found = {"answers": answers}
    if end is not None:
        for name in LAYERED:
            found |= {f"{name}.{layer}": part for layer, part in enumerate(getattr(end, name))}
    draw = torch.Generator().manual_seed(7)
    outer = sum((part * torch.randn(part.shape, generator=draw, dtype=part.dtype)).sum() for part in found.values())
    named = dict(made.named_parameters())
    named |= {f"token.{number}": part for number, part in enumerate(_tensors(given))}
    if start is not None:
        named |= {f"start.{n}": part for n, part in enumerate(layers_of(start))}
    gradients = torch.autograd.grad(outer, list(named.values()), allow_unused=True, materialize_grads=True)
    found |= {f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    if end is not None:
        found["offset"] = end.offset
    return {name: part.detach() for name, part in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Fails with every name that is further apart than `tolerance` of its largest number."""
    assert found.keys() == expected.keys()
    apart = {
        name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1.0))
        for name in expected
        if expected[name].numel()
    }
    wrong = {name: error for name, error in apart.items() if not error <= tolerance}
    assert not wrong, f"differ: {wrong}"
