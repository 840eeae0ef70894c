"""Where rows of earlier tasks are kept: preallocated tensors, and a policy that decides which rows stay.

Every process of a run holds the same buffer: rows are gathered over processes before they are added, and all
draw from the run's `strategy` generator. Which rows stay is decided on the CPU from counts and random numbers,
so that a reservoir never makes a step wait for the device. The other policies read each row's class, and sort all
rows' numbers at every step (about 1 ms for 5,000 rows).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.strategies.world import World
from clplat.streams.base import digest
from clplat.streams.batch import Batch

Policy = Literal["reservoir", "ring", "class_balanced", "ring_reservoir"]

SLOT = "slot:"
"""How the names of extra tensors begin that say where in a buffer replayed rows lie; they live for one step."""
BEST = "extra.best_loss"
"""Field with the lowest loss of each row so far, in a buffer that tracks losses."""


class Buffer:
    """Up to `capacity` rows of batches that all have the same fields.

    `reservoir`: a uniform sample of everything ever added (Vitter 1985, algorithm R).
    `ring`: an equal share for every class, the latest rows of each (the ring of Chaudhry et al. 2019, with a share
    that shrinks as classes arrive, so that the buffer is full from the start). `class_balanced`: an equal share for
    every class, a uniform sample of each (the aim of Chrysakis & Moens 2020). Classes smaller than their share are
    kept whole, and the others share what is left. For token rows the task stands in for the class.
    `ring_reservoir` is `ring_reservoir.RingReservoir`.
    Integers are kept as int32, which halves token rows; `origin` and `weight` are not kept. `stamps` (capacity, 2) are
    the optimizer step at which each row came, and the number of tasks that had been finished by then.

    With `tracks`, the name of an extra tensor, draws bring the places of their rows plus one under that name, and
    `measured` takes the losses that these rows turned out to have: the lowest of each is kept beside the row.
    """

    long_from = 0
    """The first place of the long-term rows; those before it are recent ones."""

    def __init__(
        self, *, capacity: int, policy: Policy, generator: torch.Generator, world: World, tracks: str | None = None
    ) -> None:
        self.capacity, self.policy, self.generator, self.world, self.tracks = capacity, policy, generator, world, tracks
        self.rows: dict[str, Tensor] = {}
        self.size = self.seen = 0
        self.stamps = torch.zeros(capacity, 2, dtype=torch.long)
        self.rises = torch.zeros(2, 2, dtype=torch.float64)
        self.groups = torch.empty(0, dtype=torch.long)
        self.priority = torch.empty(0, dtype=torch.float64)
        self.round, self.round_size = torch.empty(0, dtype=torch.long), 0

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept now."""
        return sum(store[: self.size].nbytes for store in self.rows.values())

    def add(
        self,
        batch: Batch,
        priority: Tensor | None = None,
        *,
        loss: Tensor | None = None,
        stamp: tuple[int, int] = (0, 0),
    ) -> None:
        """Offer the rows of a batch, on every process as many; the policy decides which stay.

        With `priority` (B,), on the batch's device, `class_balanced` keeps of each class the rows of lowest number
        instead of a sample. `loss` (B,) is what the rows have cost so far, `stamp` when they came.
        """
        count = len(batch) * self.world.size
        if self.policy == "reservoir":
            taken, slots = vitter(self.seen, count, self.capacity, self.generator)
        else:
            taken, slots = self._balanced(self._groups_of(batch), priority)
        self.seen += count
        if len(taken):
            self._put(self._fields(batch, loss), taken, slots, stamp)

    def _fields(self, batch: Batch, loss: Tensor | None) -> dict[str, Tensor]:
        """What is kept of a batch's rows, of all processes."""
        fields = stored_fields(batch)
        fields.pop(BEST, None)
        if self.tracks:
            unknown = torch.full((len(batch),), float("inf"), device=batch.inputs.device)
            fields[BEST] = unknown if loss is None else loss.float()
        if self.rows:
            # What other strategies mixed in brings fields of theirs (logits) to the current rows too, filled with 0.
            fields = {n: t for n, t in fields.items() if n in self.rows or not n.startswith("extra.")}
        if self.rows and fields.keys() != self.rows.keys():
            raise ValueError(f"tasks differ in the fields of their rows, {sorted(self.rows)} and {sorted(fields)}; "
                             "replay needs the same in all tasks")  # fmt: skip
        fields = {name: self.world.gather(tensor) for name, tensor in fields.items()}
        if not self.rows:
            self._allocate(fields)
        return fields

    def _put(self, fields: Mapping[str, Tensor], taken: Tensor, slots: Tensor, stamp: tuple[int, int]) -> None:
        """The rows `taken` of some fields come to the places `slots`; both lie on the CPU."""
        self.size = max(self.size, int(slots.max()) + 1)
        self.stamps[slots] = torch.tensor(stamp)
        for name, store in self.rows.items():
            # Not blocking: the indices come from the CPU, and waiting for the device would stall the step.
            store[slots.to(store.device, non_blocking=True)] = fields[name][taken.to(store.device, non_blocking=True)]

    def draw(self, count: int, *, rounds: bool = False, step: int | None = None, position: int | None = None) -> Batch:
        """`count` rows at random for this process, none twice while there are enough; other processes get others.

        With `rounds` every row comes once before one comes again, over all such draws from a memory of one size. Else
        the rows are those of `available(step, position)`.
        """
        total = count * self.world.size
        places = self._next_of_round(total) if rounds else self._some_of(self.available(step, position), total)
        return self._drawn(places)

    def available(self, step: int | None = None, position: int | None = None) -> Tensor:
        """Places, on the CPU, of the rows that came before a step and before a task number, each if given."""
        places = torch.arange(self.size)
        if step is None and position is None:
            return places
        limits = torch.tensor([2**62 if limit is None else limit for limit in (step, position)])
        return places[(self.stamps[: self.size] < limits).all(1)]

    def _some_of(self, places: Tensor, count: int) -> Tensor:
        if count <= len(places):
            return places[torch.randperm(len(places), generator=self.generator)[:count]]
        return places[torch.randint(len(places), (count,), generator=self.generator)]

    def _drawn(self, places: Tensor) -> Batch:
        """This process's share of the rows at some places, with the places where losses are tracked."""
        index = places[self.world.rank :: self.world.size]
        rows = {n: store[index.to(store.device, non_blocking=True)] for n, store in self.rows.items()}
        batch = self._batch(rows)
        if self.tracks:
            batch.extra[self.tracks] = (index + 1).to(batch.inputs.device, non_blocking=True)
        return batch

    def measured(self, slots: Tensor, loss: Tensor) -> None:
        """Take the losses (N,) of the rows at places `slots` − 1; 0 stands for a row of somebody else.

        `rises` adds up, for recent and for long-term rows, max(0, loss − lowest before) and the number of rows; a row
        that had no loss before counts as no rise. Nothing waits for the device.
        """
        slots, loss = self.world.gather(slots), self.world.gather(loss.float())
        best = torch.cat([self.rows[BEST].new_zeros(1), self.rows[BEST]])
        before = best[slots]
        rise = torch.where(before.isinf(), 0.0, (loss - before).clamp(min=0))
        group = (slots > self.long_from).long()
        mine = (slots > 0).double()
        both = torch.stack([rise.double() * mine, mine], 1)
        self.rises = self.rises.to(loss.device, non_blocking=True).index_add(0, group, both)
        best.scatter_reduce_(0, slots, loss, "amin")
        self.rows[BEST].copy_(best[1:])

    def _next_of_round(self, count: int) -> Tensor:
        if self.round_size != self.size:
            self.round, self.round_size = self.round[:0], self.size
        while len(self.round) < count:
            self.round = torch.cat([self.round, torch.randperm(self.size, generator=self.generator)])
        index, self.round = self.round[:count], self.round[count:]
        return index

    def batch(self, rows: slice = slice(None)) -> Batch:
        """The rows that are kept, or some of them, in the order of their places."""
        return self._batch({name: store[: self.size][rows] for name, store in self.rows.items()})

    def data(self) -> StoredRows:
        """The rows that are kept now, as data to train on, on the CPU until the loader moves them."""
        return StoredRows(self.batch().to("cpu"))

    def _batch(self, rows: Mapping[str, Tensor]) -> Batch:
        return Batch.from_tensors({n: t.long() if t.dtype == torch.int32 else t for n, t in rows.items() if n != BEST})

    def _allocate(self, fields: Mapping[str, Tensor]) -> None:
        self.rows = {name: tensor.new_empty(self.capacity, *tensor.shape[1:]) for name, tensor in fields.items()}

    def _balanced(self, new_groups: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which new rows stay, and the slots of those that go: every group keeps its rows of lowest priority number.

        Filling rank by rank over all groups gives equal shares. A row that once fell out would never be wanted
        again, so what stays is exactly what the rule picks from everything seen.
        """
        new = len(new_groups)
        if given is not None:
            fresh = self.world.gather(given).cpu().double()
        elif self.policy == "ring":
            fresh = -(self.seen + torch.arange(new, dtype=torch.float64))
        else:
            fresh = torch.rand(new, generator=self.generator, dtype=torch.float64)
        groups, priority = torch.cat([self.groups, new_groups]), torch.cat([self.priority, fresh])
        by_priority = priority.argsort()
        order = by_priority[groups[by_priority].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - torch.searchsorted(groups[order], groups[order])
        stays = torch.zeros(len(order), dtype=torch.bool)
        stays[by_priority[rank[by_priority].argsort(stable=True)][: self.capacity]] = True
        taken = stays[self.size :].nonzero().flatten()
        free = torch.cat([(~stays[: self.size]).nonzero().flatten(), torch.arange(self.size, self.size + new)])
        slots = free[: len(taken)]
        grown = (int(stays.sum()) - self.size,)
        self.groups = torch.cat([self.groups, new_groups.new_zeros(grown)])
        self.priority = torch.cat([self.priority, fresh.new_zeros(grown)])
        self.groups[slots], self.priority[slots] = new_groups[taken], fresh[taken]
        return taken, slots

    def _groups_of(self, batch: Batch) -> Tensor:
        labels = batch.targets if batch.targets.ndim == 1 else batch.task
        if labels is None:
            raise ValueError(f"policy: {self.policy} needs the task of every row of tokens; choose reservoir")
        return self.world.gather(labels).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Rows and counters; the generator belongs to the run."""
        return {
            "rows": {name: store[: self.size].clone() for name, store in self.rows.items()},
            "seen": self.seen,
            "groups": self.groups.clone(),
            "priority": self.priority.clone(),
            "round": self.round.clone(),
            "round_size": self.round_size,
            "stamps": self.stamps[: self.size].clone(),
            "rises": self.rises.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`, with the rows on `device`."""
        self.seen, self.groups, self.priority = state["seen"], state["groups"].clone(), state["priority"].clone()
        self.round, self.round_size = state["round"].clone(), state["round_size"]
        self.stamps[: len(state["stamps"])], self.rises = state["stamps"], state["rises"].to(device)
        self.rows, self.size = {}, 0
        if state["rows"]:
            self._allocate({name: tensor.to(device) for name, tensor in state["rows"].items()})
        for name, tensor in state["rows"].items():
            self.size = len(tensor)
            self.rows[name][: self.size] = tensor


def vitter(seen: int, count: int, capacity: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of `count` new rows stay, and their slots: row number n takes a slot below n + 1 at random."""
    number = seen + torch.arange(count)
    chance = torch.rand(count, generator=generator, dtype=torch.float64)
    slots = torch.where(number < capacity, number, (chance * (number + 1)).long())
    taken = (slots < capacity).nonzero().flatten()
    # Of several rows that take one slot the last one stays, as if they had come one by one.
    ordered, order = slots[taken].sort(stable=True)
    last = ordered.diff(append=torch.tensor([-1])) != 0
    return taken[order[last]], ordered[last]


class StoredRows:
    """The rows of one batch as a set to train on (`streams.base.Data`)."""

    def __init__(self, rows: Batch) -> None:
        self.rows, tensors = rows, rows.tensors().values()
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self.digest = digest(*tensors)
        self.tokens_per_row = math.prod(rows.targets.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor) -> Batch:
        return self.rows.rows(rows.to(self.rows.inputs.device, non_blocking=True))

    def to(self, device: torch.device) -> StoredRows:
        """The same rows on another device."""
        moved = copy.copy(self)
        moved.rows = self.rows.to(device)
        return moved


def stored_fields(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch that a buffer keeps, as it keeps them."""
    kept = {name: tensor for name, tensor in batch.tensors().items()
            if name not in ("origin", "weight") and not name.startswith(f"extra.{SLOT}")}  # fmt: skip
    return {name: tensor.int() if tensor.dtype == torch.long else tensor for name, tensor in kept.items()}
