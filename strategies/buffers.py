"""Where rows of earlier tasks are kept: preallocated tensors, and a policy that decides which rows stay.

All processes of a run keep one buffer, each its share of the rows: place s is with process s mod size, and a budget
is that of all together. What is decided (which rows stay, where, which are drawn) each of them decides for all places
alike, from counts, classes and the run's `strategy` generator, so that rows alone travel, and the buffer is that of one
process. It is decided on the CPU, so that a reservoir never makes a step wait for the device. The other policies read
each row's class, and sort all rows' numbers at every step (about 1 ms for 5,000 rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.strategies.stored_rows import StoredRows, stored_fields
from clplat.strategies.world import World, row_bytes, rows_at
from clplat.streams.batch import Batch

Policy = Literal["reservoir", "ring", "class_balanced", "ring_reservoir"]

BEST = "extra.best_loss"
"""The lowest loss of each row so far, as a state calls it, where losses are tracked."""


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
    `measured` takes the losses that these rows turned out to have: the lowest of each is kept in `best`.

    `rows` are this process's share. What is known of a row beside it (`stamps`, `best`, group and priority: at most 36
    bytes) every process has of all rows.
    """

    long_from = 0
    """The first place of the long-term rows; those before it are recent ones."""

    def __init__(
        self, *, capacity: int, policy: Policy, generator: torch.Generator, world: World, tracks: str | None = None
    ) -> None:
        self.capacity, self.policy, self.generator, self.world, self.tracks = capacity, policy, generator, world, tracks
        self.rows: dict[str, Tensor] = {}
        self.best = torch.empty(0)
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
        """Bytes of the rows that are kept now by all processes together: a budget and a run's costs are those of the
        run, and not smaller on more devices. Each process answers alone, without asking the others."""
        lowest_loss = self.best.element_size() if self.tracks else 0
        return self.size * (sum(row_bytes(store) for store in self.rows.values()) + lowest_loss)

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
            self._put(self._fields(batch), taken, slots, stamp, self._losses(batch, loss))

    def _fields(self, batch: Batch) -> dict[str, Tensor]:
        """What is kept of a batch's rows, of this process."""
        fields = stored_fields(batch)
        fields.pop(BEST, None)
        if self.rows:
            # What other strategies mixed in brings fields of theirs (logits) to the current rows too, filled with 0.
            fields = {n: t for n, t in fields.items() if n in self.rows or not n.startswith("extra.")}
        if self.rows and fields.keys() != self.rows.keys():
            raise ValueError(f"tasks differ in the fields of their rows, {sorted(self.rows)} and {sorted(fields)}; "
                             "replay needs the same in all tasks")  # fmt: skip
        if not self.rows:
            self._allocate(fields, batch.inputs.device)
        return fields

    def _losses(self, batch: Batch, loss: Tensor | None) -> Tensor:
        """What a batch's rows have cost so far, of all processes; nothing where losses are not tracked."""
        if not self.tracks:
            return self.best
        unknown = torch.full((len(batch),), float("inf"), device=batch.inputs.device)
        return self.world.gather(unknown if loss is None else loss.float())

    def _put(
        self, fields: Mapping[str, Tensor], taken: Tensor, slots: Tensor, stamp: tuple[int, int], losses: Tensor
    ) -> None:
        """The rows numbered `taken` of all processes' `fields` come to the places `slots`; both lie on the CPU."""
        self.size = max(self.size, int(slots.max()) + 1)
        self.stamps[slots] = torch.tensor(stamp)
        if self.tracks:
            self.best[slots.to(self.best.device, non_blocking=True)] = rows_at({BEST: losses}, taken)[BEST]
        rank, size = self.world.rank, self.world.size
        mine = slots if size == 1 else slots[slots % size == rank] // size
        for name, tensor in self.world.deal(fields, taken, slots % size).items():
            # Not blocking: the indices come from the CPU, and waiting for the device would stall the step.
            self.rows[name][mine.to(tensor.device, non_blocking=True)] = tensor

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
        rank, size = self.world.rank, self.world.size
        batch = self._batch(self.world.deal(self.rows, places, torch.arange(len(places)) % size))
        if self.tracks:
            batch.extra[self.tracks] = (places[rank::size] + 1).to(batch.inputs.device, non_blocking=True)
        return batch

    def measured(self, slots: Tensor, loss: Tensor) -> None:
        """Take the losses (N,) of the rows at places `slots` − 1; 0 stands for a row of somebody else.

        `rises` adds up, for recent and for long-term rows, max(0, loss − lowest before) and the number of rows; a row
        that had no loss before counts as no rise. Nothing waits for the device.
        """
        slots, loss = self.world.gather(slots), self.world.gather(loss.float())
        best = torch.cat([self.best.new_zeros(1), self.best])
        before = best[slots]
        rise = torch.where(before.isinf(), 0.0, (loss - before).clamp(min=0))
        group = (slots > self.long_from).long()
        mine = (slots > 0).double()
        both = torch.stack([rise.double() * mine, mine], 1)
        self.rises = self.rises.to(loss.device, non_blocking=True).index_add(0, group, both)
        best.scatter_reduce_(0, slots, loss, "amin")
        self.best.copy_(best[1:])

    def _next_of_round(self, count: int) -> Tensor:
        if self.round_size != self.size:
            self.round, self.round_size = self.round[:0], self.size
        while len(self.round) < count:
            self.round = torch.cat([self.round, torch.randperm(self.size, generator=self.generator)])
        index, self.round = self.round[:count], self.round[count:]
        return index

    def batch(self, rows: slice = slice(None)) -> Batch:
        """The rows that are kept, or some of them, in the order of their places; on every process, and all ask."""
        start, stop, step = rows.indices(self.size)
        found = self.world.together(self.rows, start, max(start, stop))
        return self._batch({name: tensor[::step] for name, tensor in found.items()})

    def share(self, rows: slice) -> Batch:
        """This process's share of consecutive rows: every size-th, beginning with the one that its rank counts."""
        (start, stop, _), rank, size = rows.indices(self.size), self.world.rank, self.world.size
        if start % size:
            places = torch.arange(start, stop)
            return self._batch(self.world.deal(self.rows, places, torch.arange(len(places)) % size))
        # Those that it holds.
        first = start // size
        own = slice(first, first + len(range(start + rank, stop, size)))
        return self._batch({name: store[own] for name, store in self.rows.items()})

    def data(self) -> StoredRows:
        """The rows that are kept now, as data to train on, on the CPU until the loader moves them; all ask for them."""
        return StoredRows(self._batch(self.world.together(self.rows, 0, self.size, torch.device("cpu"))))

    def _batch(self, rows: Mapping[str, Tensor]) -> Batch:
        return Batch.from_tensors({n: t.long() if t.dtype == torch.int32 else t for n, t in rows.items()})

    def _allocate(self, like: Mapping[str, Tensor], device: torch.device) -> None:
        """Room for this process's places, and for a loss of each row of all."""
        places = len(range(self.world.rank, self.capacity, self.world.size))
        self.rows = {name: t.new_empty(places, *t.shape[1:], device=device) for name, t in like.items()}
        self.best = torch.empty(self.capacity * bool(self.tracks), device=device)

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
        """Rows of all processes, of which each has to ask, and counters; the generator belongs to the run.

        It is what one process would have, so that any number of them may go on from it. Several have it on the CPU.
        """
        alone = self.world.size == 1
        rows = self.world.together(self.rows, 0, self.size, None if alone else torch.device("cpu"))
        rows = {name: tensor.clone() for name, tensor in rows.items()} if alone else rows
        if self.tracks and rows:
            rows[BEST] = self.best[: self.size].clone()
        return {
            "rows": rows,
            "seen": self.seen,
            "groups": self.groups.clone(),
            "priority": self.priority.clone(),
            "round": self.round.clone(),
            "round_size": self.round_size,
            "stamps": self.stamps[: self.size].clone(),
            "rises": self.rises.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`, also of another number of processes; this one's share of rows on `device`."""
        self.seen, self.groups, self.priority = state["seen"], state["groups"].clone(), state["priority"].clone()
        self.round, self.round_size = state["round"].clone(), state["round_size"]
        self.stamps[: len(state["stamps"])], self.rises = state["stamps"], state["rises"].to(device)
        self.rows, self.size = {}, 0
        rows, losses = {n: t for n, t in state["rows"].items() if n != BEST}, state["rows"].get(BEST)
        if rows:
            self._allocate(rows, device)
        for name, tensor in rows.items():
            self.size, own = len(tensor), tensor[self.world.rank :: self.world.size]
            self.rows[name][: len(own)] = own
        if losses is not None:
            self.best[: len(losses)] = losses


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
