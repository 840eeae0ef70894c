"""Where rows of earlier tasks are kept: preallocated tensors, and a policy that decides which rows stay.

Every process of a run holds the same buffer: rows are gathered over processes before they are added, and all
draw from the run's `strategy` generator. Policies decide on the CPU, so a step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.streams.batch import Batch

Policy = Literal["reservoir", "ring", "class_balanced"]


class Buffer:
    """Up to `capacity` rows, or as many as fit into `capacity_bytes`, of batches of one shape.

    `reservoir`: a uniform sample of everything ever added (Vitter 1985, algorithm R). `ring`: the latest rows.
    `class_balanced`: as equal a share of every class (of every task, for token rows) as what was seen allows,
    a uniform sample within each. Integers are kept as int32.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        generator: torch.Generator,
    ) -> None:
        if (capacity is None) == (capacity_bytes is None):
            raise ValueError("capacity, capacity_bytes: give exactly one of them")
        if (capacity or capacity_bytes or 0) < 1:
            raise ValueError(f"capacity, capacity_bytes: must be positive, got {capacity or capacity_bytes}")
        self.policy, self.capacity, self.capacity_bytes, self.generator = policy, capacity, capacity_bytes, generator
        self.rows: dict[str, Tensor] = {}
        self.size = self.seen = 0
        self.priority = torch.empty(0, dtype=torch.float64)
        self.groups = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept now."""
        return self.size * sum(store[:1].nbytes for store in self.rows.values())

    def add(self, batch: Batch) -> None:
        """Offer the rows of a batch; the policy decides which stay."""
        fields = {n: _compact(t) for n, t in batch.tensors().items() if n not in ("origin", "weight")}
        if not self.rows:
            self._allocate(fields)
        groups = self._groups_of(batch) if self.policy == "class_balanced" else None
        taken, slots = self._choose(len(batch), groups)
        self.seen += len(batch)
        if len(taken):
            device = next(iter(fields.values())).device
            source, target = taken.to(device), slots.to(device)
            for name, store in self.rows.items():
                store[target] = fields[name][source]
            self.size = max(self.size, int(slots.max()) + 1)

    def draw(self, count: int, *, share: tuple[int, int] = (0, 1)) -> Batch:
        """`count` rows at random, without repetition while there are enough; `share` (rank, size) of them."""
        if count <= self.size:
            index = torch.randperm(self.size, generator=self.generator)[:count]
        else:
            index = torch.randint(self.size, (count,), generator=self.generator)
        index = index[share[0] :: share[1]].to(next(iter(self.rows.values())).device)
        rows = {name: store[index] for name, store in self.rows.items()}
        return Batch.from_tensors({n: t.long() if t.dtype == torch.int32 else t for n, t in rows.items()})

    def _allocate(self, fields: Mapping[str, Tensor]) -> None:
        row_bytes = sum(tensor[:1].nbytes for tensor in fields.values())
        if self.capacity is None:
            assert self.capacity_bytes is not None
            self.capacity = self.capacity_bytes // row_bytes
            if self.capacity == 0:
                raise ValueError(f"capacity_bytes: {self.capacity_bytes} hold no row; one row takes {row_bytes}")
        self.rows = {n: torch.empty(self.capacity, *t.shape[1:], dtype=t.dtype, device=t.device) for n, t in fields.items()}

    def _choose(self, count: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which of `count` new rows stay, and the slots that they take."""
        assert self.capacity is not None
        if self.policy == "ring":
            taken = torch.arange(max(0, count - self.capacity), count)
            return taken, (self.seen + taken) % self.capacity
        if groups is not None:
            return self._balanced(groups)
        number = self.seen + torch.arange(count)
        chance = torch.rand(count, generator=self.generator, dtype=torch.float64)
        slots = torch.where(number < self.capacity, number, (chance * (number + 1)).long())
        # Of several rows that take one slot the last one stays, as if they had come one by one.
        later = (slots[:, None] == slots[None, :]).triu(1).any(1)
        kept = (slots < self.capacity) & ~later
        return torch.arange(count)[kept], slots[kept]

    def _balanced(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Every row has a random priority; rows are ranked within their group, and the lowest ranks stay."""
        assert self.capacity is not None
        chance = torch.rand(len(groups), generator=self.generator, dtype=torch.float64)
        group, priority = torch.cat([self.groups, groups]), torch.cat([self.priority, chance])
        by_priority = priority.argsort()
        order = by_priority[group[by_priority].argsort(stable=True)]
        sorted_group = group[order]
        first = torch.searchsorted(sorted_group, sorted_group)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - first
        kept = (rank.double() + priority).argsort()[: self.capacity]
        stays = torch.zeros(len(group), dtype=torch.bool)
        stays[kept] = True
        old = stays[: self.size]
        taken = stays[self.size :].nonzero().flatten()
        free = torch.cat([(~old).nonzero().flatten(), torch.arange(self.size, self.capacity)])
        slots = free[: len(taken)]
        grown = max(self.size, int(slots.max()) + 1 if len(slots) else 0)
        self.groups, self.priority = _grown(self.groups, grown), _grown(self.priority, grown)
        self.groups[slots], self.priority[slots] = groups[taken], chance[taken]
        return taken, slots

    def _groups_of(self, batch: Batch) -> Tensor:
        if batch.targets.ndim == 1:
            return batch.targets.cpu()
        if batch.task is None:
            raise ValueError("policy: class_balanced needs the task of every row; choose reservoir or ring")
        return batch.task.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Rows and counters; the generator belongs to the run."""
        return {
            "rows": {name: store[: self.size].clone() for name, store in self.rows.items()},
            "capacity": self.capacity, "seen": self.seen, "priority": self.priority, "groups": self.groups,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`, with the rows on `device`."""
        self.capacity, self.seen = state["capacity"], state["seen"]
        self.priority, self.groups = state["priority"].clone(), state["groups"].clone()
        rows = {name: tensor.to(device) for name, tensor in state["rows"].items()}
        self.size = len(next(iter(rows.values()))) if rows else 0
        self.rows = {}
        if rows:
            self._allocate(rows)
            for name, tensor in rows.items():
                self.rows[name][: self.size] = tensor


def _compact(tensor: Tensor) -> Tensor:
    return tensor.int() if tensor.dtype == torch.long else tensor


def _grown(tensor: Tensor, size: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(size - len(tensor))])
