"""What an architecture is: an `nn.Module` from a batch to an `Output`, with a life cycle of no-ops.

A model of one's own subclasses `Architecture`, takes `spec` (what the stream needs: see `streams.base.Spec`)
and its own options as keyword arguments, and defines `forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clplat.streams.base import Task
from clplat.streams.batch import Batch

State = Any
"""Carried state: a pytree of tensors, or None. Always passed and returned, never hidden in a buffer."""


@dataclass(kw_only=True)
class Output:
    """Result of one forward: `logits` (B, C) or (B, T, V), auxiliary losses by name (scalars that are
    added to the training loss), the carried `state`, and `hidden` activations where they were asked for. `stash`:
    what the model's `step_end` wants of this forward, detached tensors of B rows by name; those of the batches of one
    optimizer step are joined. `predicted`: where logits are of no interest but at targets, the places (N,) of these
    among the B·T tokens, at which alone logits were computed; the others are 0."""

    logits: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    state: State = None
    hidden: Tensor | None = None
    stash: dict[str, Tensor] = field(default_factory=dict)
    predicted: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a finished optimizer step leaves for delayed writes: the mixed batch and each row's loss,
    `row_loss` (B,) or (B, T) detached, with `batch.origin` telling current from replay."""

    step: int
    batch: Batch
    output: Output
    row_loss: Callable[[], Tensor]
    """Computed when asked for, so that a run in which nobody asks pays nothing."""


class Architecture(nn.Module):
    """Base of every model.

    Class attributes declare what tests and the platform rely on: `causal` (True, False, or None where time
    has no meaning), `memory_life` of the carried state, `batch_coupled` (rows influence each other in training,
    as with BatchNorm), `frozen` (name prefixes of parameters that get no gradient), `may_idle` (a step may leave others
    without one too, which several processes then have to look for), `several_heads` (it answers the questions of
    streams with `spec.heads`), `paper`.
    A state whose `memory_life` is task or run is the mean over the processes of a run, so that it is the same on all
    of them; what of it is no floating-point number is taken from the first.
    """

    causal: ClassVar[bool | None] = None
    memory_life: ClassVar[Literal["sequence", "task", "run"]] = "sequence"
    batch_coupled: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    may_idle: ClassVar[bool] = False
    several_heads: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    fidelity: ClassVar[Literal["exact", "mechanism", "interpretation", "standard"]] = "standard"

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits for every row; `state` continues an earlier pass over the same rows."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def task_start(self, task: Task) -> None:
        """A task begins; may grow the model."""

    def may_grow(self) -> bool:
        """Whether `task_start` may change the shape of what the model holds. A class whose `task_start` does not says
        so of itself, and not of subclasses with another one."""
        return type(self).task_start is not Architecture.task_start

    def step_end(self, outcome: StepOutcome) -> None:
        """An optimizer step is done; delayed writes to memory live here."""

    def structure(self) -> Mapping[str, Any]:
        """Plain data from which `restructure` rebuilds a grown model before its weights are loaded."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Grow to the shape that `structure` describes."""
        if structure:
            raise ValueError(f"{type(self).__name__} cannot rebuild the structure {dict(structure)!r}")

    def init_state(self, batch_size: int) -> State:
        """Empty carried state for step-by-step decoding, or None."""
        return None

    def measurements(self) -> Mapping[str, float]:
        """Numbers about the model that are worth a curve, `model/NAME` in the record; asked for at task boundaries
        only. Draws from no global random source and changes nothing."""
        return {}

    def not_finite(self) -> str | None:
        """Where in the model the first number that was not finite arose, in words, if it knows; asked for once a
        loss or a weight is not."""
        return None

    def facts(self) -> Mapping[str, str]:
        """Words about how the model computes that belong to the record as tags, `architecture.NAME`; asked for when
        measurements are, so that what has run is known."""
        return {}

    def flops_per_row(self) -> float:
        """Forward operations for one row (one sample, or one row of T tokens): 2 per weight and use."""
        dense = sum(p.numel() for p in self.parameters() if p.ndim >= 2)
        return 2.0 * dense

    def active_parameters(self) -> int:
        """Parameters that one row passes through; below the total for routed models."""
        return sum(p.numel() for p in self.parameters())


def as_in_task(architecture: Architecture, tasks: Sequence[Task]) -> Architecture:
    """A copy as it is once all of `tasks` have started, so that growth is known before anything is trained.

    The model itself where no task makes it grow: a copy of all weights is what a large model has no room for. The
    global random source is left as it was.
    """
    if not architecture.may_grow():
        return architecture
    later = copy.deepcopy(architecture)
    with torch.random.fork_rng(devices=[]):
        for task in tasks:
            later.task_start(task)
    return later


@runtime_checkable
class Decodes(Protocol):
    """Capability: step-by-step decoding with carried state equals one full pass."""

    def init_state(self, batch_size: int) -> State: ...

    def decode(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Tensor, State]:
        """Logits (B, T, V) for `tokens` (B, T), given `lengths` (B,) tokens already in `state`."""
        ...


@runtime_checkable
class GeneratesWeights(Protocol):
    """Capability: shared parameters generate, for every task, the weights that answer its rows."""

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """By name the trainable parameters on which the weights of all tasks depend, task embeddings left out."""
        ...

    def generated_weights(self, tasks: Sequence[int], parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Flat weights (N, W) for N tasks that have started, with `parameters` in place of shared ones of that name."""
        ...

    def answer_with(self, weights: Tensor, batch: Batch, task: int) -> Output:
        """The answer with flat weights (W,) and what else is kept for the task."""
        ...


@dataclass(frozen=True, kw_only=True)
class LevelPeriod:
    """Parameters that are to be trained together, once in `period` steps; `lr` None is the optimizer's.

    `within`: the level at whose periods' ends they begin anew, `start_rate` of the way from where they began to where
    they have come.
    """

    parameters: tuple[str, ...]
    period: int
    lr: float | None
    reduction: Literal["sum", "mean"]
    within: str | None = None
    start_rate: float = 1.0


@runtime_checkable
class HasLevels(Protocol):
    """Capability: parts of the model are to be trained at periods of their own, as `LevelClock` does."""

    def levels(self) -> Mapping[str, LevelPeriod]:
        """By name; empty where this model has none. Parameters that are in none step every time."""
        ...


@runtime_checkable
class LearnsNextToken(Protocol):
    """Capability: levels that are to learn the next token of a text while it is scored, by whoever scores it."""

    def next_token_levels(self) -> Mapping[str, LevelPeriod]:
        """By name, with periods in tokens and rates; empty where this model has none."""
        ...

    def rows_answer_by(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it each row has weights of its own, (B, …) by the names of the levels' parameters."""
        ...


@runtime_checkable
class WritesMemory(Protocol):
    """Capability: memories inside write while they read, and can be kept from it."""

    def writes_memory(self) -> bool:
        """Whether there are any such memories in this model."""
        ...

    def without_writes(self) -> AbstractContextManager[None]:
        """Within it all memories stay as they begin."""
        ...


@runtime_checkable
class Adapters(Protocol):
    """Capability: adapters, small trained parts by name, beside a backbone that stays as it is.

    The tensors of all adapters of a model go by the same names, so that those of two can be paired.
    """

    active: tuple[str, ...]
    trained: tuple[str, ...]

    def adapter_names(self) -> list[str]: ...

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """By name the tensors of one adapter."""
        ...

    def add_adapter(self, adapter: str) -> None:
        """One more that changes nothing yet, neither active nor trained."""
        ...

    def use_adapters(self, active: Sequence[str], trained: Sequence[str] | None = None) -> None:
        """Which adapters answer, their changes added up, and which of these are trained (None: all of them)."""
        ...

    def answering(self, *adapters: str) -> AbstractContextManager[None]:
        """Within it other adapters answer; what is trained stays so. To be left before `backward`."""
        ...


@runtime_checkable
class Prompts(Protocol):
    """Capability: trained vectors that stand before a text's embeddings, beside a backbone that stays as it is."""

    def prompt_names(self) -> list[str]: ...

    def add_prompt(self, prompt: str, length: int) -> None:
        """`length` more vectors under a name, neither shown nor trained yet."""
        ...

    def prompt_room(self) -> int | None:
        """How many vectors fit before the stream's rows; None where nothing bounds them."""
        ...

    def use_prompts(self, shown: Sequence[str], trained: Sequence[str] | None = None) -> None:
        """Which prompts stand before every text, in this order, and which of them are trained (None: all of them)."""
        ...

    def add_pool(self, *, size: int, length: int, top_k: int, query_tokens: int, matching: float) -> None:
        """`size` prompts with a key each, of which every text is shown the `top_k` whose keys are nearest to the mean
        embedding of its first `query_tokens` tokens; `matching` weighs the distance of those keys in the loss."""
        ...


@runtime_checkable
class SideMemories(Adapters, Protocol):
    """Capability: adapters that are memories beside the feed-forward layers (Locas), as many slots in every layer."""

    @property
    def needs_beginning(self) -> bool:
        """Whether a memory is only what the model's options say once `begin_memory` has been called."""
        ...

    def begin_memory(self, memory: str, batch: Batch, generator: torch.Generator) -> None:
        """Make of a memory what the model's options say, from what the layers do with a batch."""
        ...

    def forget_memory(self, memory: str) -> None:
        """Let a memory change nothing again, until it is begun."""
        ...

    def make_permanent(self, memory: str) -> None:
        """Make a memory a part of the layers: frozen, and answering whatever else does."""
        ...


def device_of(module: nn.Module) -> torch.device:
    """The device of the module's first parameter."""
    return next(module.parameters()).device
