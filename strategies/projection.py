"""Projection of the gradient, so that a step does not raise the loss on remembered rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.strategies.buffers import Buffer
from clplat.streams.base import Task


class AGEM(Strategy):
    """Averaged gradient episodic memory: where the gradient opposes that of a draw from memory, that part goes.

    g̃ = g − min(0, g·r) / (r·r) · r, with r the gradient of the mean loss on `sample_size` remembered rows. Whether
    the two oppose each other is never asked on the CPU, so that a step does not wait for the device.
    """

    replays = True
    knobs: ClassVar[tuple[str, ...]] = ("sample_size",)
    paper = "Chaudhry et al. 2019, arXiv:1812.00420, Eq. 11"
    fidelity: ClassVar[Fidelity] = "exact"

    def __init__(self, *, patterns_per_task: int, sample_size: int) -> None:
        """`patterns_per_task` rows are drawn from each task at its end and kept; every step draws `sample_size` of
        all that are kept (at 0 nothing is projected), shared out over the processes of the run."""
        if patterns_per_task < 1:
            raise ValueError(f"patterns_per_task: must be at least 1, got {patterns_per_task}")
        if sample_size < 0:
            raise ValueError(f"sample_size: must not be negative, got {sample_size}")
        self.patterns_per_task, self.sample_size = patterns_per_task, sample_size

    def setup(self, context: Context) -> None:
        super().setup(context)
        size = context.world.size
        for name in ("patterns_per_task", "sample_size"):
            if getattr(self, name) % size:
                raise ValueError(f"AGEM.{name}: {getattr(self, name)} rows cannot be shared equally by {size} "
                                 f"processes; give a multiple of {size}")  # fmt: skip
        # Larger than will ever be needed, so that the reservoir keeps whatever it is offered.
        rows = sum(min(self.patterns_per_task, len(task.train)) for task in context.tasks)
        self.memory = Buffer(capacity=rows, policy="reservoir", generator=context.generator, world=context.world)

    def gradient(self) -> None:
        count = round(self.sample_size) // self.context.world.size
        if not count or not len(self.memory):
            return
        weights = [p for p in self.context.architecture.parameters() if p.requires_grad]
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
        batch = self.memory.draw(count)
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


def _dot(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Inner product of two gradients that are given tensor by tensor, in float32 at least; stays on the device."""
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    return torch.stack([torch.dot(a.flatten().to(wide), b.flatten().to(wide)) for a, b in pairs]).sum()
