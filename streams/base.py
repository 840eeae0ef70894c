"""What a stream is: tasks with data, sets to score, and the few facts a model needs of them.

A stream of one's own is a class with `spec`, `tasks` and a constructor whose keyword arguments are its
YAML options. `TensorData` serves anything that fits in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from clplat.streams.batch import Batch
from clplat.streams.budget import Budget

if TYPE_CHECKING:
    from clplat.streams.scorers import Scorer

Scenario = Literal["task", "domain", "class"]


@runtime_checkable
class Data(Protocol):
    """A set of rows that is sliced, never collated.

    A set with a true attribute `ordered` is read in the order of its rows, which is the order of a text, and never
    shuffled.
    """

    digest: str
    """Identity of the content (hex)."""
    nbytes: int
    """Bytes of all rows: what replay budgets are a share of."""
    tokens_per_row: int
    """Target tokens a row holds; 1 for samples."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> Batch:
        """The rows `rows` (B,) long, numbered on the CPU, as one batch on the device where the data lives."""
        ...


@runtime_checkable
class Movable(Protocol):
    """Capability of data: to live on the learner's device."""

    def to(self, device: torch.device) -> Data:
        """The same rows on `device`; the data itself where they are better left where they are."""
        ...


class TensorData:
    """Rows held as tensors: slicing is one index operation on the device where they live."""

    tokens_per_row = 1

    def __init__(self, inputs: Tensor, targets: Tensor, *, task: int) -> None:
        """`inputs` (N, ...), `targets` (N,) long; `task` is the index of the task that they belong to."""
        if len(inputs) != len(targets):
            raise ValueError(f"inputs have {len(inputs)} rows, targets {len(targets)}")
        self.inputs, self.targets = inputs, targets
        self.task = torch.full((len(inputs),), task, dtype=torch.long, device=inputs.device)
        self.nbytes = inputs.nbytes + targets.nbytes
        self.digest = digest(inputs, targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Tensor) -> Batch:
        rows = rows.to(self.inputs.device, non_blocking=True)
        # Whole rows are copied by index_select; indexing goes element by element, which takes twice as long.
        inputs = self.inputs.index_select(0, rows)
        return Batch(inputs=inputs, targets=self.targets[rows], task=self.task[:1].expand(len(rows)))

    def to(self, device: torch.device) -> TensorData:
        """The same rows on another device."""
        moved = object.__new__(type(self))
        moved.__dict__ |= {n: v.to(device) if isinstance(v, Tensor) else v for n, v in self.__dict__.items()}
        return moved


class JoinedData:
    """Several sets as one, in order: what joint and cumulative training read."""

    def __init__(self, parts: Sequence[Data]) -> None:
        self.parts = list(parts)
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.nbytes = sum(part.nbytes for part in parts)
        self.tokens_per_row = parts[0].tokens_per_row
        self.digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, rows: Tensor) -> Batch:
        """The rows, grouped by the set they come from."""
        owner = torch.searchsorted(self.starts, rows, right=True) - 1
        taken = [
            part.batch(rows[owner == number] - self.starts[number])
            for number, part in enumerate(self.parts)
            if bool((owner == number).any())
        ]
        names = taken[0].tensors().keys()
        return Batch.from_tensors({name: torch.cat([batch.tensors()[name] for batch in taken]) for name in names})

    def to(self, device: torch.device) -> JoinedData:
        """The same rows with those parts that can move on another device."""
        return JoinedData([part.to(device) if isinstance(part, Movable) else part for part in self.parts])


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a scorer reports, with the direction in which it is good, and the best that it can be."""

    higher_is_better: bool
    unit: str = ""
    best: float | None = None

    def reachable(self, threshold: float) -> bool:
        """Whether a value as good as `threshold` is possible at all."""
        if self.best is None:
            return True
        return threshold <= self.best if self.higher_is_better else threshold >= self.best


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Rows to be scored, and how."""

    name: str
    data: Data
    scorer: Scorer


@dataclass(frozen=True, kw_only=True)
class Task:
    """One station of a stream.

    `classes` are the output units that the task introduces, or the numbers of the labels that its rows end in (None
    for language without labels). `headline` names the metric
    of `test.scorer` that goals and summary metrics use, read through the view `view`. `budget` overrides the
    study's. A strategy may look at the boundary only where `boundary_known`.
    """

    index: int
    name: str
    train: Data
    test: EvalSet
    val: EvalSet | None = None
    classes: tuple[int, ...] | None = None
    headline: str
    view: str = "default"
    budget: Budget | None = None
    boundary_known: bool = True


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an architecture has to know of a stream in order to be built.

    `num_outputs` is the number of classes, or the vocabulary size. `input_shape` is the shape of one sample,
    or (T,) for token rows. `scenario` is None for language without labels. `vocab_size` says that the samples of a
    classification are rows of token ids below it, filled up on the right with `pad_token`. `heads` says that every
    sample is asked so many questions at once, each with `num_outputs` answers and a head of its own: targets
    (B, heads), `IGNORE` where a question is not asked, and logits (B, heads, C).
    """

    kind: Literal["classify", "language"]
    input_shape: tuple[int, ...]
    num_outputs: int
    scenario: Scenario | None = None
    end_token: int | None = None
    vocab_size: int | None = None
    pad_token: int | None = None
    heads: int | None = None


class Stream:
    """An ordered sequence of tasks.

    A subclass sets `spec` and `tasks` in `prepare`, which may read files, tokenise and fill caches; its
    constructor only checks its options, so that a wrong configuration fails at once. A constructor that has a
    parameter `seed` is given the run's seed. `probes` are sets scored after every task beside the result table.
    `augment` changes the inputs (B, ...) of every training batch, replayed rows included, at each use anew: buffers
    keep rows as they were, and evaluation reads them so. It may draw from torch's global generator of the inputs'
    device, which runs save and restore.
    """

    spec: Spec
    tasks: Sequence[Task]
    probes: Sequence[EvalSet] = ()
    augment: Callable[[Tensor], Tensor] | None = None
    paper: str = ""

    def prepare(self) -> None:
        """Read, tokenise, cache: everything that takes time. Called once, before anything else is asked."""

    def order(self) -> str:
        """The task order as one short word for tags and tables."""
        return ">".join(task.name for task in self.tasks)

    def facts(self) -> Mapping[str, object]:
        """Plain data worth logging once (sizes, shares, how the data was split)."""
        return {}


def spread_rows(total: int, limit: int | None) -> Tensor:
    """Numbers of at most `limit` of `total` rows, spread evenly over the whole; all of them without a limit."""
    count = total if limit is None else min(limit, total)
    return torch.arange(count) * total // max(1, count)


def digest(*tensors: Tensor) -> str:
    """Identity of some tensors' content: 16 hex digits of SHA-256 over dtype, shape and bytes."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]
