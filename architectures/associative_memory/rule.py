"""The choices that make an associative memory, typed; one that cannot be raises ValueError with the field's name.

What each of them computes stands in `token_loop.py`. The division into memory, bias, retention and optimiser is that
of Miras (Behrouz et al. 2025, arXiv:2504.13173).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from clplat.architectures.option_checks import check_at_least, check_choices

Activation = Literal["gelu", "silu"]
Feature = Literal["identity", "unit", "elu", "poly", "taylor"]
BiasKind = Literal["dot", "l2", "lp", "huber"]
Retention = Literal["none", "decay", "channel"]
InnerOptimizer = Literal["gd", "momentum", "muon"]
GradientAt = Literal["chunk", "token", "decayed"]
Target = Literal["value", "self"]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The memory itself. `depth` 1 is a matrix, more is an MLP without biases whose inner layers are `expand` times as
    wide as a key before its features. `residual` adds the key to the answer; `norm` normalises the answer before (layer
    norm, whose scale and shift are trained by the outer loss alone, as in TTT)."""

    group: ClassVar[str] = "memory"

    depth: int = 1
    expand: int = 4
    activation: Activation = "gelu"
    residual: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        check_choices(self, activation=Activation)
        check_at_least(self, 1, "depth", "expand")


@dataclass(frozen=True, kw_only=True)
class BiasOptions:
    """The inner loss of an answer p to a key whose target is v, the attentional bias. With e = p − v:

    dot −⟨p, v⟩ · l2 ½‖e‖² · lp Σ (e² + smoothing)^(power/2) / power, which is ℓ_p with its corner rounded ·
    huber Σ ½e² where |e| ≤ δ, else δ|e| − ½δ², with a threshold δ for every token and head.
    """

    group: ClassVar[str] = "bias"

    kind: BiasKind = "l2"
    power: float = 3.0
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        check_choices(self, kind=BiasKind)
        check_at_least(self, 1, "power")
        check_at_least(self, 0, "smoothing")
        if self.power < 2 and not self.smoothing:
            raise ValueError("bias.smoothing: must be above 0 where power is below 2, whose slope is infinite at 0")


@dataclass(frozen=True, kw_only=True)
class PolynomialOptions:
    """The features `poly` and `taylor`: products of up to `degree` numbers of a key, see `features.py`. `rank` learned
    products of each degree; None are all of them, head size ** degree."""

    group: ClassVar[str] = "polynomial"

    degree: int = 2
    rank: int | None = 64

    def __post_init__(self) -> None:
        check_at_least(self, 1, "degree", "rank")

    def widths(self, key_size: int) -> list[int]:
        """Features of each degree, from 1."""
        return [key_size, *(self.rank or key_size**degree for degree in range(2, self.degree + 1))]


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    """How a memory is written and read.

    `feature` map of queries and keys: none, unit length, elu + 1, which is positive, or polynomials of the unit key.
    `retention`: nothing is forgotten, one gate a token and head, or one for each input channel of each layer.
    `optimizer`: a gradient step a token, one with momentum, or muon: momentum that is orthogonalised, one step a chunk.
    `window`: how many pairs, up to its own, a token's step learns. `gradient_at`: where a token's gradient is taken: at
    the memory as it was when its chunk began, as it was before the token, or that decayed (the gated delta rule).
    `chunk`: tokens that are computed at once; with `gradient_at: chunk` it is part of the function, otherwise it
    changes rounding and speed alone.
    `target` of a key's answer: the token's value, or the answer that the memory itself gives to that value.
    """

    memory: NetworkOptions = field(default_factory=NetworkOptions)
    feature: Feature = "unit"
    polynomial: PolynomialOptions = field(default_factory=PolynomialOptions)
    bias: BiasOptions = field(default_factory=BiasOptions)
    retention: Retention = "none"
    optimizer: InnerOptimizer = "gd"
    gradient_at: GradientAt = "chunk"
    chunk: int = 16
    target: Target = "value"
    window: int = 1

    def __post_init__(self) -> None:
        check_choices(
            self, feature=Feature, retention=Retention, optimizer=InnerOptimizer, gradient_at=GradientAt, target=Target
        )
        check_at_least(self, 1, "chunk", "window")
        plain = self.memory.depth == 1 and not (self.memory.norm or self.memory.residual)
        if self.gradient_at != "chunk" and not (plain and self.bias.kind == "l2" and self.target == "value"):
            raise ValueError(
                f"gradient_at: {self.gradient_at!r} is computed for a matrix memory (depth 1, no norm, no residual), "
                "bias l2 and target value alone; chunk with chunk: 1 takes every gradient before its token, too"
            )
        for name, asked in (("window", self.window > 1), ("optimizer", self.optimizer == "muon")):
            if asked and self.gradient_at != "chunk":
                raise ValueError(f"{name}: {getattr(self, name)!r} needs gradient_at: chunk, got {self.gradient_at!r}")

    @property
    def hebbian(self) -> bool:
        """Whether no gradient depends on the memory."""
        return self.bias.kind == "dot" and self.memory.depth == 1 and not self.memory.norm and self.target == "value"

    @property
    def anchored(self) -> bool:
        """Whether chunks are part of the function."""
        return self.gradient_at == "chunk" and (self.orthogonal or not self.hebbian)

    @property
    def orthogonal(self) -> bool:
        """Whether momentum is orthogonalised."""
        return self.optimizer == "muon"

    @property
    def momentous(self) -> bool:
        """Whether there is momentum."""
        return self.optimizer != "gd"

    def feature_width(self, key_size: int) -> int:
        """Features of a key of that size."""
        if self.feature not in ("poly", "taylor"):
            return key_size
        return sum(self.polynomial.widths(key_size)) + (self.feature == "taylor")

    def widths(self, key_size: int, value_size: int) -> list[tuple[int, int]]:
        """Inputs and outputs of every layer."""
        inner = [self.memory.expand * key_size] * (self.memory.depth - 1)
        return list(zip([self.feature_width(key_size), *inner], [*inner, value_size], strict=True))
