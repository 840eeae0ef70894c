"""The choices that make an associative memory, typed; one that cannot be raises ValueError with the field's name.

What each of them computes stands in `token_loop.py`. The division into memory, bias, retention and optimiser is that
of Miras (Behrouz et al. 2025, arXiv:2504.13173).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from clplat.architectures.associative_memory.maps import MapOptions
from clplat.architectures.option_checks import check_at_least, check_choices, check_finite, check_idle

NetworkKind = Literal["mlp", "swiglu"]
Activation = Literal["gelu", "silu"]
Feature = Literal["identity", "unit", "elu", "poly", "taylor"]
BiasKind = Literal["dot", "l2", "lp", "huber"]
HuberForm = Literal["feature", "norm", "switch"]
Retention = Literal["none", "decay", "channel"]
InnerOptimizer = Literal["gd", "momentum", "muon"]
GradientAt = Literal["chunk", "token", "decayed"]
Read = Literal["post", "chunk_start"]
Target = Literal["value", "self"]
Delta = Literal["none", "single", "double"]
DeltaOn = Literal["every", "first", "last"]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The memory itself. `kind` mlp of `depth` 1 is a matrix, more is an MLP without biases whose inner layers are
    `expand` times as wide as a key before its features, or `inner_size` wide; swiglu, of depth 2, is
    down(σ(gate(x)) ⊙ up(x)), three matrices. `residual` adds the key to the answer; `norm` normalises the answer before
    (layer norm, whose scale and shift are trained by the outer loss alone, as in TTT)."""

    group: ClassVar[str] = "memory"

    kind: NetworkKind = "mlp"
    depth: int = 1
    expand: int = 4
    inner_size: int | None = None
    activation: Activation = "gelu"
    residual: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        check_choices(self, kind=NetworkKind, activation=Activation)
        check_at_least(self, 1, "depth", "expand", "inner_size")
        if self.kind == "swiglu" and self.depth != 2:
            raise ValueError(f"memory.depth: a swiglu has depth 2, got {self.depth}")


@dataclass(frozen=True, kw_only=True)
class BiasOptions:
    """The inner loss of an answer p to a key whose target is v, the attentional bias. With e = p − v:

    dot −⟨p, v⟩ · l2 ½‖e‖² · lp Σ (e² + smoothing)^(power/2) / power, which is ℓ_p with its corner rounded ·
    huber with a threshold δ for every token and head, and H(a) = ½a² where |a| ≤ δ, else δ|a| − ½δ². `huber` says of
    what: feature Σ H(e) · norm H(‖e‖₂) · switch, as Yaad has it, ½‖e‖² where ‖e‖₂ ≤ δ, else δ‖e‖₁ − ½δ².
    """

    group: ClassVar[str] = "bias"

    kind: BiasKind = "l2"
    power: float = 3.0
    smoothing: float = 1e-6
    huber: HuberForm = "feature"

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, kind=BiasKind, huber=HuberForm)
        check_at_least(self, 1, "power")
        check_at_least(self, 0, "smoothing")
        if self.kind != "lp":
            check_idle(self, f"kind {self.kind}", "kind: lp", "power", "smoothing")
        if self.kind != "huber":
            check_idle(self, f"kind {self.kind}", "kind: huber", "huber")
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
    `retention`: nothing is forgotten, one gate a token and head, or one for each input channel of each layer. `map`:
    what makes the memory's weights of that on which steps and decay act, where retention is not linear (`maps.py`).
    `optimizer`: a gradient step a token, one with momentum, or muon: momentum that is orthogonalised, one step a chunk.
    `window`: how many pairs, up to its own, a token's step learns. `gradient_at`: where a token's gradient is taken: at
    the memory as it was when its chunk began, as it was before the token, or that decayed (the gated delta rule).
    `chunk`: tokens that are computed at once; with `gradient_at: chunk`, `read: chunk_start` or a map it is part of the
    function, otherwise it changes rounding and speed alone. `read`: a query asks the memory behind its own token's
    write, or as it was when its chunk began. `target` of a key's answer: the token's value, or the answer that the
    memory itself gives to that value.

    `delta`: each token also erases what a layer answers to its direction, with the strength of its step. `double` is
    the rule as printed for Hope, whose gradient takes the old answer off once more: alone, a pair is learned to half of
    its value. `single` leaves the old answer out of the gradient, as the gated delta rule does. `delta_on`: layers that
    erase: all, those that read keys, or the one that gives answers. `max_gradient`: a token's gradient of a layer, if
    longer, is shortened to this norm.
    """

    group: ClassVar[str] = "rule"

    memory: NetworkOptions = field(default_factory=NetworkOptions)
    feature: Feature = "unit"
    polynomial: PolynomialOptions = field(default_factory=PolynomialOptions)
    bias: BiasOptions = field(default_factory=BiasOptions)
    retention: Retention = "none"
    map: MapOptions = field(default_factory=MapOptions)
    optimizer: InnerOptimizer = "gd"
    gradient_at: GradientAt = "chunk"
    chunk: int = 16
    read: Read = "post"
    target: Target = "value"
    delta: Delta = "none"
    delta_on: DeltaOn = "every"
    max_gradient: float | None = None
    window: int = 1

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(
            self, feature=Feature, retention=Retention, optimizer=InnerOptimizer, gradient_at=GradientAt, read=Read,
            target=Target, delta=Delta, delta_on=DeltaOn,
        )  # fmt: skip
        check_at_least(self, 1, "chunk", "window")
        if self.feature not in ("poly", "taylor") and self.polynomial != PolynomialOptions():
            raise ValueError(
                f"rule.polynomial: has no effect with feature {self.feature}; leave it out, or set feature: poly"
            )
        if self.delta == "none":
            check_idle(self, "delta none", "delta: single", "delta_on")
        self._check_gradients()
        self._check_erasing()
        if self.orthogonal and self.map.kind in ("lq", "kl"):
            raise ValueError(f"map.kind: {self.map.kind!r} is not computed with optimizer muon; norm or none is")

    def _check_gradients(self) -> None:
        plain = self.memory.depth == 1 and not (self.memory.norm or self.memory.residual)
        if self.gradient_at != "chunk" and not (plain and self.bias.kind == "l2" and self.target == "value"):
            raise ValueError(
                f"gradient_at: {self.gradient_at!r} is computed for a matrix memory (depth 1, no norm, no residual), "
                "bias l2 and target value alone; chunk with chunk: 1 takes every gradient before its token, too"
            )
        asked = {
            "window": self.window > 1, "optimizer": self.orthogonal, "delta": self.delta != "none",
            "map": self.mapped, "max_gradient": self.max_gradient is not None,
        }  # fmt: skip
        for name in (name for name, is_asked in asked.items() if is_asked):
            if self.gradient_at != "chunk":
                given = self.map.kind if name == "map" else getattr(self, name)
                raise ValueError(f"{name}: {given!r} needs gradient_at: chunk, got {self.gradient_at!r}")
        if self.max_gradient is not None and self.max_gradient <= 0:
            raise ValueError(f"max_gradient: must be above 0, got {self.max_gradient}")

    def _check_erasing(self) -> None:
        if self.delta == "none":
            return
        if self.delta == "single" and self.memory.norm:
            raise ValueError("delta: 'single' has no meaning under memory.norm, which has no slope at an answer of 0")
        if self.mapped or self.orthogonal or self.window > 1:
            raise ValueError(
                f"delta: {self.delta!r} is computed with optimizer gd or momentum and window 1 alone, without a map"
            )

    @property
    def hebbian(self) -> bool:
        """Whether no gradient depends on the memory."""
        blind = self.bias.kind == "dot" or self.delta == "single"
        return blind and self.memory.depth == 1 and not self.memory.norm and self.target == "value"

    @property
    def largest_rate(self) -> float:
        """Of steps on unit keys, above which a memory that erases diverges; infinite for one that does not."""
        return {"none": math.inf, "single": 2.0, "double": 1.0}[self.delta]

    @property
    def steepness(self) -> float:
        """λ, the curvature of ½‖M(k) − v‖² along the gradient for a unit key and a value no longer, where M answers v:
        steps that sum to more than 2 / λ swing ever further around it.

        Layers whose product answers m, of length Π s_ℓ, have λ = Σ_ℓ (Π_{j≠ℓ} s_j)², which is least where all are
        equal: depth · ‖m‖^(2 − 2/depth), 1 for a matrix. With `residual` the layers answer v − k, of length 2 at most.
        Activations are left out: what they take off, layers make up for.
        """
        longest, depth = 2.0 if self.memory.residual else 1.0, self.memory.depth
        return float(depth * longest ** (2 - 2 / depth))

    def erases(self, layer: int) -> bool:
        """Whether tokens erase in that layer, counted from the keys."""
        first = layer == 0 or (self.memory.kind == "swiglu" and layer == 1)
        last = layer == (2 if self.memory.kind == "swiglu" else self.memory.depth - 1)
        return self.delta != "none" and {"every": True, "first": first, "last": last}[self.delta_on]

    @property
    def mapped(self) -> bool:
        """Whether something happens to the weights where a chunk ends."""
        return self.map.kind != "none"

    @property
    def reads_in_turn(self) -> bool:
        """Whether each query of a chunk asks another memory."""
        return self.read == "post" and not self.map.lags

    @property
    def steps_together(self) -> bool:
        """Whether all tokens of a chunk step from the same weights, each without knowing of the others."""
        return self.gradient_at == "chunk" and (self.orthogonal or not self.hebbian)

    @property
    def anchored(self) -> bool:
        """Whether chunks are part of the function."""
        return self.steps_together or self.read == "chunk_start" or self.mapped

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
        """Inputs and outputs of every layer; of a swiglu: gate, up, down."""
        read, inside = self.feature_width(key_size), self.memory.inner_size or self.memory.expand * key_size
        if self.memory.kind == "swiglu":
            return [(read, inside), (read, inside), (inside, value_size)]
        inner = [inside] * (self.memory.depth - 1)
        return list(zip([read, *inner], [*inner, value_size], strict=True))


def check_rate(name: str, max_rate: float, rule: MemoryRule) -> None:
    """Refuse steps on unit keys with which a memory that erases would diverge."""
    if not 0 < max_rate <= rule.largest_rate:
        raise ValueError(
            f"{name}: must lie above 0 and, for a memory with delta: {rule.delta}, at most at {rule.largest_rate:g}, "
            f"beyond which it diverges, got {max_rate}"
        )
