"""Experience replay: rows of earlier tasks come back beside the current ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clplat.architectures.base import StepOutcome
from clplat.strategies.base import Context, Strategy
from clplat.strategies.buffers import Buffer, Policy
from clplat.streams.batch import CURRENT, REPLAY, Batch


class ExperienceReplay(Strategy):
    """Keep some rows of what was seen and add a draw of them to every batch; current rows are never displaced."""

    replays = True
    knobs = ("ratio", "weight")
    paper = "Chaudhry et al. 2019, arXiv:1902.10486"

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        weight: float = 1.0,
        from_task: int = 2,
    ) -> None:
        """`capacity` in rows (samples, or rows of tokens) or `capacity_bytes`; `ratio` replayed rows for each
        current one; `weight` of their mean loss; replay begins with task number `from_task` (1: with the first,
        from rows of the same task)."""
        if ratio < 0 or weight < 0:
            raise ValueError(f"ratio, weight: must not be negative, got {ratio} and {weight}")
        self.capacity, self.capacity_bytes, self.policy = capacity, capacity_bytes, policy
        self.ratio, self.weight, self.from_task = ratio, weight, from_task

    def setup(self, context: Context) -> None:
        super().setup(context)
        check_capacity(context, self.capacity, self.capacity_bytes)
        self.buffer = Buffer(
            policy=self.policy, capacity=self.capacity, capacity_bytes=self.capacity_bytes, generator=context.generator
        )
        self.fresh: list[Batch] = []

    def batch(self, batch: Batch) -> Batch:
        self.fresh.append(current_rows(batch))
        count = round(self.ratio * len(batch) * self.context.world.size)
        if not count or not len(self.buffer) or not self.active():
            return batch
        share = (self.context.world.rank, self.context.world.size)
        return batch.joined(self.buffer.draw(count, share=share).with_origin(REPLAY, self.weight))

    def active(self) -> bool:
        """Whether the current task is late enough for replay."""
        return self.context.task is not None and len(self.context.past) + 1 >= self.from_task

    def step_end(self, outcome: StepOutcome) -> None:
        for batch in self.fresh:
            self.buffer.add(gathered(batch, self.context))
        self.fresh.clear()

    def stored_bytes(self) -> int:
        return self.buffer.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"], self.context.device())


def current_rows(batch: Batch) -> Batch:
    """The rows of the current task in a batch that another strategy may have mixed already."""
    return batch if batch.origin is None else batch.rows(batch.origin == CURRENT)


def gathered(batch: Batch, context: Context) -> Batch:
    """The rows of all processes, in rank order, so that every process adds the same."""
    if context.world.size == 1:
        return batch
    return Batch.from_tensors({name: context.world.gather(tensor) for name, tensor in batch.tensors().items()})


def check_capacity(context: Context, capacity: int | None, capacity_bytes: int | None) -> None:
    """Refuse a buffer that would hold more than there is to train on: that is cumulative training."""
    rows = sum(len(task.train) for task in context.tasks)
    size = sum(task.train.nbytes for task in context.tasks)
    if capacity is not None and capacity > rows:
        raise ValueError(f"capacity: {capacity} rows are more than the stream's {rows} training rows; lower it, "
                         "or use Cumulative")  # fmt: skip
    if capacity_bytes is not None and capacity_bytes > size:
        raise ValueError(f"capacity_bytes: {capacity_bytes} bytes are more than the stream's {size} bytes of "
                         "training data; lower it, or use Cumulative")  # fmt: skip
