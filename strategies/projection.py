"""Projection of the gradient, so that a step does not raise the loss on remembered rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.strategies.buffers import Buffer
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class _EpisodicMemory(Strategy):
    """Rows of every task, drawn at its end and never dropped."""

    replays = True

    def __init__(self, *, patterns_per_task: int) -> None:
        if patterns_per_task < 1:
            raise ValueError(f"patterns_per_task: must be at least 1, got {patterns_per_task}")
        self.patterns_per_task = patterns_per_task

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.refuse_unequal_shares("patterns_per_task")
        most = max(len(task.train) for task in context.tasks)
        if self.patterns_per_task > most:
            raise ValueError(f"{type(self).__name__}.patterns_per_task: {self.patterns_per_task} rows, more than any "
                             f"task has to train on ({most}); lower it, or use Cumulative")  # fmt: skip
        # Larger than will ever be needed, so that the reservoir keeps whatever it is offered, in order.
        rows = sum(min(self.patterns_per_task, len(task.train)) for task in context.tasks)
        self.memory = Buffer(capacity=rows, policy="reservoir", generator=context.generator, world=context.world)

    def refuse_unequal_shares(self, name: str) -> None:
        """Refuse a number of rows that the processes of the run cannot share equally."""
        rows, size = getattr(self, name), self.context.world.size
        if rows % size:
            raise ValueError(f"{type(self).__name__}.{name}: {rows} rows cannot be shared equally by {size} "
                             f"processes; give a multiple of {size}")  # fmt: skip

    def weights(self) -> list[torch.nn.Parameter]:
        """The weights whose gradients are projected."""
        return [p for p in self.context.architecture.parameters() if p.requires_grad]

    def mean_gradient(self, weights: list[torch.nn.Parameter], batch: Batch) -> list[Tensor]:
        """Gradient of the mean loss on the rows of all processes, for each of `weights`; the same on all."""
        loss = self.context.loss(self.context.architecture(batch), batch)
        own = torch.autograd.grad(loss, weights, materialize_grads=True)
        world = self.context.world
        return [world.sum(part) / world.size for part in own] if world.size > 1 else list(own)

    def task_end(self, task: Task) -> None:
        world = self.context.world
        kept = min(self.patterns_per_task, len(task.train)) // world.size * world.size
        rows = torch.randperm(len(task.train), generator=self.context.generator)[:kept].sort().values
        if len(rows):
            # Each process brings every size-th row, and the buffer gathers them.
            self.memory.add(task.train.batch(rows[world.rank :: world.size]).to(self.context.device()))

    def stored_bytes(self) -> int:
        return self.memory.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"], self.context.device())


class AGEM(_EpisodicMemory):
    """Averaged gradient episodic memory: where the gradient opposes that of a draw from memory, that part goes.

    g̃ = g − min(0, g·r) / (r·r) · r, with r the gradient of the mean loss on `sample_size` remembered rows. Whether
    the two oppose each other is never asked on the CPU, so that a step does not wait for the device.
    """

    knobs: ClassVar[tuple[str, ...]] = ("sample_size",)
    paper = "Chaudhry et al. 2019, arXiv:1812.00420, Eq. 11"
    fidelity: ClassVar[Fidelity] = "exact"

    def __init__(self, *, patterns_per_task: int, sample_size: int) -> None:
        """`patterns_per_task` rows are drawn from each task at its end and kept; every step draws `sample_size` of
        all that are kept (at 0 nothing is projected), shared out over the processes of the run."""
        super().__init__(patterns_per_task=patterns_per_task)
        if sample_size < 0:
            raise ValueError(f"sample_size: must not be negative, got {sample_size}")
        self.sample_size = sample_size

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.refuse_unequal_shares("sample_size")

    def gradient(self) -> None:
        count = round(self.sample_size) // self.context.world.size
        if not count or not len(self.memory):
            return
        weights = self.weights()
        reference = self.reference_gradient(weights, count)
        pairs = [(p.grad, part) for p, part in zip(weights, reference) if p.grad is not None]
        if not pairs:
            return
        opposed = _dot(pairs).clamp(max=0)
        length = _dot([(part, part) for part in reference])
        # A reference of exactly zero opposes nothing: 0 / tiny stays 0.
        opposed = opposed / length.clamp(min=torch.finfo(length.dtype).tiny)
        for gradient, part in pairs:
            gradient.sub_(opposed * part)

    def reference_gradient(self, weights: list[torch.nn.Parameter], count: int) -> list[Tensor]:
        """Gradient of the mean loss on a draw from memory, for each of `weights`; the same on all processes."""
        return self.mean_gradient(weights, self.memory.draw(count))


class GEM(_EpisodicMemory):
    """Gradient episodic memory: the nearest gradient that opposes that of no earlier task.

    g̃ = g + Gᵀv, with the rows of G the gradients of the mean loss on each earlier task's remembered rows, and v the
    minimum of ½ vᵀGGᵀv + gᵀGᵀv over v ≥ `memory_strength`; a gradient that opposes no task stays as it is. The
    minimum is found on the CPU in float64, so that every step waits for the device.
    """

    knobs: ClassVar[tuple[str, ...]] = ("memory_strength",)
    paper = "Lopez-Paz & Ranzato 2017, arXiv:1706.08840"
    fidelity: ClassVar[Fidelity] = "exact"

    def __init__(self, *, patterns_per_task: int, memory_strength: float = 0.5) -> None:
        """`patterns_per_task` rows are drawn from each task at its end and kept, and every step goes through all of
        them; `memory_strength` ≥ 0 (the paper's γ) bends gradients further towards the earlier tasks."""
        super().__init__(patterns_per_task=patterns_per_task)
        if memory_strength < 0:
            raise ValueError(f"memory_strength: must not be negative, got {memory_strength}")
        self.memory_strength = memory_strength

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.ends: list[int] = []

    def gradient(self) -> None:
        weights = self.weights()
        if not self.ends or all(p.grad is None for p in weights):
            return
        reference = self.reference_gradients(weights)
        own = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in weights])
        overlap, opposed = (part.cpu().double().numpy() for part in (reference @ reference.T, reference @ own))
        if (opposed >= 0).all():
            return
        multipliers = gem_multipliers(overlap, opposed, self.memory_strength)
        own = own + reference.T @ torch.from_numpy(multipliers).to(reference)
        for p, part in zip(weights, own.split([p.numel() for p in weights])):
            if p.grad is not None:
                p.grad.copy_(part.view_as(p))

    def reference_gradients(self, weights: list[torch.nn.Parameter]) -> Tensor:
        """Gradient of the mean loss on each earlier task's rows in memory, (tasks, P); the same on all processes."""
        parts = [slice(start, end) for start, end in zip([0, *self.ends], self.ends)]
        return torch.stack([_flat(self.mean_gradient(weights, self.memory.share(part))) for part in parts])

    def task_end(self, task: Task) -> None:
        super().task_end(task)
        if len(self.memory) > (self.ends[-1] if self.ends else 0):
            self.ends.append(len(self.memory))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ends": list(self.ends)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.ends = list(state["ends"])


RIDGE = 1e-3
"""What the authors' program adds to the diagonal of GGᵀ, so that tasks with parallel gradients do no harm."""


def gem_multipliers(overlap: np.ndarray, opposed: np.ndarray, margin: float) -> np.ndarray:
    """The minimum of ½ vᵀPv + qᵀv over v ≥ margin, with P = `overlap` + RIDGE·I (T, T) and q = `opposed` (T,).

    The T bounds are pivoted one by one, always the first that is wrong: Murty's rule (1974), which ends for every
    positive definite P. Rounding alone could keep it from settling; then the best of what is feasible stands.
    """
    P = overlap + RIDGE * np.eye(len(overlap))
    q = opposed + P.sum(1) * margin
    free, v = np.zeros(len(q), dtype=bool), np.zeros(len(q))
    for _ in range(100 * len(q)):
        v = np.zeros(len(q))
        v[free] = np.linalg.solve(P[np.ix_(free, free)], -q[free])
        wrong = np.where(free, v, P @ v + q) < -1e-12 * np.abs(q).max()
        if not wrong.any():
            break
        free[wrong.argmax()] ^= True
    return v.clip(min=0) + margin


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """One vector (P,) of a gradient that is given tensor by tensor, in float32 at least."""
    flat = torch.cat([part.flatten() for part in parts])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _dot(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Inner product of two gradients that are given tensor by tensor, in float32 at least; stays on the device."""
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    return torch.stack([torch.dot(a.flatten().to(wide), b.flatten().to(wide)) for a, b in pairs]).sum()
