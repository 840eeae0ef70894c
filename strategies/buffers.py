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

Policy = Literal["reservoir", "ring", "class_balanced"]


class Buffer:
    """Up to `capacity` rows of batches that all have the same fields.

    `reservoir`: a uniform sample of everything ever added (Vitter 1985, algorithm R).
    `ring`: an equal share for every class, the latest rows of each (the ring of Chaudhry et al. 2019, with a share
    that shrinks as classes arrive, so that the buffer is full from the start). `class_balanced`: an equal share for
    every class, a uniform sample of each (the aim of Chrysakis & Moens 2020). Classes smaller than their share are
    kept whole, and the others share what is left. For token rows the task stands in for the class.
    Integers are kept as int32, which halves token rows; `origin` and `weight` are not kept.
    """

    def __init__(self, *, capacity: int, policy: Policy, generator: torch.Generator, world: World) -> None:
        self.capacity, self.policy, self.generator, self.world = capacity, policy, generator, world
        self.rows: dict[str, Tensor] = {}
        self.size = self.seen = 0
        self.groups = torch.empty(0, dtype=torch.long)
        self.priority = torch.empty(0, dtype=torch.float64)
        self.round, self.round_size = torch.empty(0, dtype=torch.long), 0

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept now."""
        return sum(store[: self.size].nbytes for store in self.rows.values())

    def add(self, batch: Batch, priority: Tensor | None = None) -> None:
        """Offer the rows of a batch, on every process as many; the policy decides which stay.

        With `priority` (B,), on the batch's device, `class_balanced` keeps of each class the rows of lowest number
        instead of a sample.
        """
        count = len(batch) * self.world.size
        if self.policy == "reservoir":
            taken, slots = self._reservoir(count)
        else:
            taken, slots = self._balanced(self._groups_of(batch), priority)
        self.seen += count
        if not len(taken):
            return
        fields = stored_fields(batch)
        if self.rows:
            # What other strategies mixed in brings fields of theirs (logits) to the current rows too, filled with 0.
            fields = {n: t for n, t in fields.items() if n in self.rows or not n.startswith("extra.")}
        if self.rows and fields.keys() != self.rows.keys():
            raise ValueError(f"tasks differ in the fields of their rows, {sorted(self.rows)} and {sorted(fields)}; "
                             "replay needs the same in all tasks")  # fmt: skip
        fields = {name: self.world.gather(tensor) for name, tensor in fields.items()}
        if not self.rows:
            self._allocate(fields)
        self.size = max(self.size, int(slots.max()) + 1)
        for name, store in self.rows.items():
            # Not blocking: the indices come from the CPU, and waiting for the device would stall the step.
            store[slots.to(store.device, non_blocking=True)] = fields[name][taken.to(store.device, non_blocking=True)]

    def draw(self, count: int, *, rounds: bool = False) -> Batch:
        """`count` rows at random for this process, none twice while there are enough; other processes get others.

        With `rounds` every row comes once before one comes again, over all such draws from a memory of one size.
        """
        total = count * self.world.size
        if rounds:
            index = self._next_of_round(total)
        elif total <= self.size:
            index = torch.randperm(self.size, generator=self.generator)[:total]
        else:
            index = torch.randint(self.size, (total,), generator=self.generator)
        index = index[self.world.rank :: self.world.size]
        return self._batch({n: store[index.to(store.device, non_blocking=True)] for n, store in self.rows.items()})

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
        return Batch.from_tensors({n: t.long() if t.dtype == torch.int32 else t for n, t in rows.items()})

    def _allocate(self, fields: Mapping[str, Tensor]) -> None:
        self.rows = {name: tensor.new_empty(self.capacity, *tensor.shape[1:]) for name, tensor in fields.items()}

    def _reservoir(self, count: int) -> tuple[Tensor, Tensor]:
        """Which of `count` new rows stay, and their slots: row number n takes a slot below n + 1 at random."""
        number = self.seen + torch.arange(count)
        chance = torch.rand(count, generator=self.generator, dtype=torch.float64)
        slots = torch.where(number < self.capacity, number, (chance * (number + 1)).long())
        taken = (slots < self.capacity).nonzero().flatten()
        # Of several rows that take one slot the last one stays, as if they had come one by one.
        ordered, order = slots[taken].sort(stable=True)
        last = ordered.diff(append=torch.tensor([-1])) != 0
        return taken[order[last]], ordered[last]

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
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`, with the rows on `device`."""
        self.seen, self.groups, self.priority = state["seen"], state["groups"].clone(), state["priority"].clone()
        self.round, self.round_size = state["round"].clone(), state["round_size"]
        self.rows, self.size = {}, 0
        if state["rows"]:
            self._allocate({name: tensor.to(device) for name, tensor in state["rows"].items()})
        for name, tensor in state["rows"].items():
            self.size = len(tensor)
            self.rows[name][: self.size] = tensor


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
    kept = {name: tensor for name, tensor in batch.tensors().items() if name not in ("origin", "weight")}
    return {name: tensor.int() if tensor.dtype == torch.long else tensor for name, tensor in kept.items()}
