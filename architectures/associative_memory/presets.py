"""Published memory layers by name: each is one choice of parts, `docs/memories.md` says with which sources.

A layer of a `MemoryTransformer` is named in YAML as `{class_path: TitansLMM, init_args: {chunk: 16}}`, or by its name
alone. It knows its options, and builds its module once the model tells the hidden size.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from clplat.architectures.associative_memory.mixer import MemoryMixer, ProjectionOptions
from clplat.architectures.associative_memory.rule import (
    BiasOptions,
    Feature,
    InnerOptimizer,
    MemoryRule,
    NetworkOptions,
    PolynomialOptions,
)
from clplat.architectures.option_checks import check_at_least


class LayerKind(ABC):
    """Base of what may stand in a `MemoryTransformer`'s list of layers.

    A ValueError of its options begins with its name, and with the name that the option has here.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _named_errors(cls.__init__)  # type: ignore[method-assign]

    @abstractmethod
    def build(self, hidden_size: int) -> nn.Module:
        """The mixing layer for a stream of that width: `forward(x_BTC, reading)`, and what else `decoder.py` asks of
        one, with a `Reading` as the only context."""


def in_words_of(kind: LayerKind, error: ValueError) -> ValueError:
    """The error under the kind's name, and by its own option where that stands for one of a part: what goes wrong with
    `projection.max_rate` is said of `TitansLMM.max_rate`."""
    name, (option, colon, rest) = type(kind).__name__, str(error).partition(": ")
    if option.startswith(f"{name}."):
        return error
    own, (group, _, inner) = inspect.signature(type(kind).__init__).parameters, option.rpartition(".")
    if group.partition(".")[0] not in own and inner in own:
        option = inner
    return ValueError(f"{name}.{option}{colon}{rest}")


def _named_errors(begin: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose errors are in the words of the kind."""

    @functools.wraps(begin)
    def named(self: LayerKind, *given: Any, **options: Any) -> None:
        try:
            begin(self, *given, **options)
        except ValueError as error:
            raise in_words_of(self, error) from error

    return named


class MemoryLayer(LayerKind):
    """A memory of any parts, for combinations that nobody has named."""

    def __init__(
        self, *, rule: MemoryRule | None = None, projection: ProjectionOptions | None = None, num_heads: int = 4
    ) -> None:
        """`rule`: what is remembered and how. `projection`: what stands around. Each head has a memory of its own."""
        self.rule = MemoryRule() if rule is None else rule
        self.projection = ProjectionOptions() if projection is None else projection
        self.num_heads = num_heads
        check_at_least(self, 1, "num_heads")
        if self.projection.damped and self.rule.optimizer == "gd":
            raise ValueError("projection.damped: has no effect with optimizer gd, which has no momentum; leave it out")

    def build(self, hidden_size: int) -> MemoryMixer:
        """The layer; ValueError where heads do not divide the stream."""
        try:
            return MemoryMixer(
                hidden_size=hidden_size, num_heads=self.num_heads, rule=self.rule, projection=self.projection
            )
        except ValueError as error:
            raise in_words_of(self, error) from error


class LinearAttention(MemoryLayer):
    """Linear attention: values are added under positive keys, and answers divided by the sum of weights."""

    paper = "Katharopoulos et al. 2020, arXiv:2006.16236"

    def __init__(
        self, *, num_heads: int = 4, feature: Feature = "elu", normaliser: bool = True, conv_width: int = 1,
        chunk: int = 64,
    ) -> None:  # fmt: skip
        """`chunk` changes speed alone."""
        super().__init__(
            rule=MemoryRule(feature=feature, bias=BiasOptions(kind="dot"), chunk=chunk),
            projection=ProjectionOptions(
                conv_width=conv_width, learned_rate=False, normaliser=normaliser, output_gate="none",
                learned_start=False,
            ),
            num_heads=num_heads,
        )  # fmt: skip


class DeltaNet(MemoryLayer):
    """DeltaNet: each token moves the answer to its key towards its value, at the memory as it is before it."""

    paper = "Yang et al. 2024, arXiv:2406.06484"

    def __init__(self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 64) -> None:
        """`chunk` changes speed alone."""
        super().__init__(
            rule=MemoryRule(gradient_at="token", chunk=chunk),
            projection=ProjectionOptions(conv_width=conv_width, output_gate="none", learned_start=False),
            num_heads=num_heads,
        )


class GatedDeltaNet(MemoryLayer):
    """Gated DeltaNet: the memory decays, and the delta rule corrects what is left."""

    paper = "Yang et al. 2024, arXiv:2412.06464"

    def __init__(self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 64) -> None:
        """`chunk` changes speed alone."""
        super().__init__(
            rule=MemoryRule(gradient_at="decayed", retention="decay", chunk=chunk),
            projection=ProjectionOptions(conv_width=conv_width, learned_start=False),
            num_heads=num_heads,
        )


class TTTLinear(MemoryLayer):
    """TTT-Linear: x + LN(Wx), trained by gradients at the start of each chunk."""

    paper = "Sun et al. 2024, arXiv:2407.04620"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, max_rate: float | None = None
    ) -> None:
        """`chunk` is the paper's mini-batch of 16 tokens. `max_rate`: see `ProjectionOptions`."""
        super().__init__(
            rule=MemoryRule(memory=NetworkOptions(residual=True, norm=True), chunk=chunk),
            projection=ProjectionOptions(conv_width=conv_width, max_rate=max_rate),
            num_heads=num_heads,
        )


class TTTMLP(MemoryLayer):
    """TTT-MLP: x + LN of two layers with GELU, four times as wide inside."""

    paper = "Sun et al. 2024, arXiv:2407.04620"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, max_rate: float | None = None,
        expand: int = 4,
    ) -> None:  # fmt: skip
        """As in `TTTLinear`."""
        super().__init__(
            rule=MemoryRule(memory=NetworkOptions(depth=2, expand=expand, residual=True, norm=True), chunk=chunk),
            projection=ProjectionOptions(conv_width=conv_width, max_rate=max_rate),
            num_heads=num_heads,
        )


class TitansLMM(MemoryLayer):
    """Titans' long-term memory: an MLP with momentum and forgetting, gradients at the start of each chunk."""

    paper = "Behrouz et al. 2024, arXiv:2501.00663"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, depth: int = 2, expand: int = 4,
        residual: bool = False, max_rate: float | None = None, damped: bool = True, short_values: bool = True,
        decay_start: float = 0.99,
    ) -> None:  # fmt: skip
        """`depth` of the memory, 1 for a matrix. Chunk, expansion, residual are not in the paper, nor is what keeps it
        finite: `damped`, `short_values`, `max_rate`, see `ProjectionOptions`. A residual adds a key to each answer,
        beside which little of what was written is seen (docs/memories.md). `decay_start`: what a token leaves of the
        memory at first; layers that have all come near zero learn nothing more in that row, so that long rows need
        it near 1 (0.9999 of 4,096 tokens, say)."""
        super().__init__(
            rule=MemoryRule(
                memory=NetworkOptions(depth=depth, expand=expand, activation="silu", residual=residual),
                retention="decay", optimizer="momentum", chunk=chunk,
            ),
            projection=ProjectionOptions(
                conv_width=conv_width, max_rate=max_rate, damped=damped, short_values=short_values,
                decay_start=decay_start,
            ),
            num_heads=num_heads,
        )  # fmt: skip


class OmegaNet(MemoryLayer):
    """OmegaNet: an MLP over polynomials of keys that learns the last pairs together at each token, and forgets."""

    paper = "Behrouz et al. 2025, arXiv:2505.23735"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, window: int = 16, depth: int = 2,
        expand: int = 4, feature: Feature = "poly", degree: int = 2, rank: int | None = 64,
        max_rate: float | None = None,
    ) -> None:  # fmt: skip
        """`window` in pairs. `degree` and `rank`: see `PolynomialOptions`. Their sizes are ours."""
        super().__init__(
            rule=_atlas_rule("gd", chunk, window, NetworkOptions(depth=depth, expand=expand, activation="silu"),
                             feature, PolynomialOptions(degree=degree, rank=rank)),
            projection=ProjectionOptions(conv_width=conv_width, max_rate=max_rate), num_heads=num_heads,
        )  # fmt: skip


class Atlas(MemoryLayer):
    """Atlas: OmegaNet with momentum whose steps are orthogonalised, once a chunk."""

    paper = "Behrouz et al. 2025, arXiv:2505.23735"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, window: int = 16, depth: int = 2,
        expand: int = 4, feature: Feature = "poly", degree: int = 2, rank: int | None = 64,
        max_rate: float | None = None, damped: bool = True,
    ) -> None:  # fmt: skip
        """As in `OmegaNet`; `chunk` 1 orthogonalises at each token, as in the paper."""
        super().__init__(
            rule=_atlas_rule("muon", chunk, window, NetworkOptions(depth=depth, expand=expand, activation="silu"),
                             feature, PolynomialOptions(degree=degree, rank=rank)),
            projection=ProjectionOptions(conv_width=conv_width, max_rate=max_rate, damped=damped), num_heads=num_heads,
        )  # fmt: skip


def _atlas_rule(
    optimizer: InnerOptimizer, chunk: int, window: int, memory: NetworkOptions, feature: Feature,
    polynomial: PolynomialOptions,
) -> MemoryRule:  # fmt: skip
    return MemoryRule(
        memory=memory, feature=feature, polynomial=polynomial, retention="decay", optimizer=optimizer, chunk=chunk,
        window=window,
    )  # fmt: skip
