"""Experience replay: rows of earlier tasks come back beside the current ones, or in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clplat.architectures.base import StepOutcome
from clplat.strategies.base import Context, Fidelity, Fixed, Strategy
from clplat.strategies.buffers import Buffer, Policy
from clplat.strategies.ring_reservoir import RingReservoir
from clplat.strategies.stored_rows import SLOT, stored_fields
from clplat.streams.base import Data, Task
from clplat.streams.batch import CURRENT, IGNORE, REPLAY, Batch


class _Rehearsal(Strategy):
    """A buffer of rows within a budget of rows or bytes."""

    replays = True
    ring_share = 0.2
    tracks: str | None = None

    def __init__(self, *, capacity: int | None, capacity_bytes: int | None, policy: Policy) -> None:
        if (capacity is None) == (capacity_bytes is None):
            raise ValueError("capacity, capacity_bytes: give exactly one of them")
        self.capacity, self.capacity_bytes, self.policy = capacity, capacity_bytes, policy

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.buffer = self._new_buffer()

    def _new_buffer(self) -> Buffer:
        context, rows = self.context, self._capacity_in_rows(self.row_bytes())
        if self.policy not in ("reservoir", "ring_reservoir"):
            self.refuse_fewer_rows_than_classes(rows)
        if self.policy == "ring_reservoir":
            return RingReservoir(
                capacity=rows, ring_share=self.ring_share, generator=context.generator, world=context.world,
                tracks=self.tracks,
            )  # fmt: skip
        return Buffer(
            capacity=rows, policy=self.policy, generator=context.generator, world=context.world, tracks=self.tracks
        )

    def refuse_fewer_rows_than_classes(self, rows: int) -> None:
        """Refuse a budget in which some class (of text: some task) would have no row at all."""
        tasks = self.context.tasks
        groups = len({unit for task in tasks for unit in task.classes or (-1 - task.index,)})
        if rows < groups:
            raise ValueError(f"{type(self).__name__}.{'capacity' if self.capacity else 'capacity_bytes'}: {rows} rows "
                             f"for {groups} classes would leave some with none; give at least {groups}")  # fmt: skip

    def row_bytes(self) -> int:
        """Bytes that the buffer takes for one row."""
        one = self.context.tasks[0].train.batch(torch.tensor([0]))
        lowest_loss = 4 if self.tracks else 0
        return sum(tensor.nbytes for tensor in stored_fields(one).values()) + lowest_loss

    @property
    def stamp(self) -> tuple[int, int]:
        """When rows come that are added now: optimizer steps and tasks that are done."""
        return self.context.step, len(self.context.past)

    def offer(self, task: Task) -> None:
        """Offer all rows of a task to the buffer, each process its share."""
        world, device = self.context.world, self.context.device()
        rows = torch.arange(len(task.train) // world.size * world.size)
        for part in rows.split(1024 * world.size):
            self.buffer.add(task.train.batch(part[world.rank :: world.size]).to(device), stamp=self.stamp)

    def stored_bytes(self) -> int:
        return self.buffer.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"], self.context.device())

    def _capacity_in_rows(self, row_bytes: int) -> int:
        """The budget in rows; refuses one that holds no row, or more than there is to train on."""
        name = type(self).__name__
        if self.capacity_bytes is not None:
            option, rows = "capacity_bytes", self.capacity_bytes // row_bytes
            given = f"{self.capacity_bytes} bytes, at {row_bytes} a row, are {rows} rows"
        else:
            assert self.capacity is not None
            option, rows, given = "capacity", self.capacity, f"{self.capacity} rows"
        available = sum(len(task.train) for task in self.context.tasks)
        if rows < 1:
            raise ValueError(f"{name}.{option}: {given}; give room for at least one row")
        if rows > available:
            raise ValueError(f"{name}.{option}: {given}, more than the stream's {available} training rows; lower it"
                             + (", or use Cumulative" if type(self) is ExperienceReplay else ""))  # fmt: skip
        return rows


def rows_of_all_classes(context: Context, per_class: int, *, option: str) -> int:
    """Room for so many rows of every class of the stream; refuses, as `option`, more than there are to train on."""
    classes = {unit for task in context.tasks for unit in task.classes or ()}
    rows, available = per_class * max(1, len(classes)), sum(len(task.train) for task in context.tasks)
    if rows > available:
        raise ValueError(f"{option}: {per_class} rows of {len(classes)} classes are more than the stream's {available} "
                         "training rows; lower it")  # fmt: skip
    return rows


class ExperienceReplay(_Rehearsal):
    """Keep some rows of what was seen and add a draw of them to every batch; current rows are never displaced.

    The rows of a batch are offered to the buffer when its optimizer step is done, each time they are trained on, or
    all rows of a task when it ends.
    """

    knobs: ClassVar[tuple[str, ...]] = ("ratio", "weight", "long_share")
    shards: ClassVar[bool] = True
    paper = "Chaudhry et al. 2019, arXiv:1902.10486"
    fidelity: ClassVar[Fidelity] = "mechanism"

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        weight: float = 1.0,
        from_task: int = 2,
        mean: Literal["each", "all"] = "each",
        fill: Literal["step", "task_end"] = "step",
        draw: Literal["fresh", "rounds"] = "fresh",
        draw_from: Literal["all", "past"] = "all",
        ring_share: float = 0.2,
        long_share: float = 0.5,
    ) -> None:
        """`capacity` in rows (samples, or rows of tokens) or `capacity_bytes`; `ratio` replayed rows for each
        current one; `weight` of their mean loss; replay begins with task number `from_task`, by default the second:
        before it there is nothing to forget, and rows would come from the current task alone (1: as in the paper).
        The loss is the sum of two means, over current and over replayed rows; with `mean="all"` it is one mean over
        all of them, as in the paper and in Avalanche. `fill`: rows come into the buffer at each step, so that some of a
        draw are the current task's, or when their task has ended, as in Avalanche: every draw is of earlier tasks.
        `draw`: a new draw of the memory at every step, or the next rows of shuffled rounds through it, as in Avalanche:
        every row comes back equally often. `draw_from`: all rows, or (past) those that came before the current task,
        as far as boundaries are known: a long task fills ring and reservoir with rows of its own. Of the policy
        `ring_reservoir` the ring has `ring_share` of the capacity, and `long_share` of a draw comes from the
        reservoir."""
        super().__init__(capacity=capacity, capacity_bytes=capacity_bytes, policy=policy)
        if ratio < 0 or weight < 0:
            raise ValueError(f"ratio, weight: must not be negative, got {ratio} and {weight}")
        if mean not in ("each", "all"):
            raise ValueError(f"mean: must be each or all, got {mean!r}")
        if fill not in ("step", "task_end"):
            raise ValueError(f"fill: must be step or task_end, got {fill!r}")
        if draw not in ("fresh", "rounds"):
            raise ValueError(f"draw: must be fresh or rounds, got {draw!r}")
        if draw_from not in ("all", "past"):
            raise ValueError(f"draw_from: must be all or past, got {draw_from!r}")
        if draw == "rounds" and (draw_from == "past" or policy == "ring_reservoir"):
            raise ValueError("draw: rounds go through the whole memory; with draw_from: past, or the policy "
                             "ring_reservoir, use fresh")  # fmt: skip
        if not 0 <= long_share <= 1:
            raise ValueError(f"long_share: must lie between 0 and 1, got {long_share}")
        self.ratio, self.weight, self.from_task = ratio, weight, from_task
        self.mean, self.fill, self.rounds, self.draw_from = mean, fill, draw == "rounds", draw_from
        self.ring_share, self.long_share = ring_share, long_share

    def setup(self, context: Context) -> None:
        super().setup(context)
        sizes = [len(task.train) for task in context.tasks]
        rows = min(context.batch_size, max(sizes))
        if self.ratio * rows > sum(sizes):
            raise ValueError(f"{type(self).__name__}.ratio: {self.ratio:g} rows for each of {rows} current ones are "
                             f"more a step than the stream's {sum(sizes)} training rows; lower it")  # fmt: skip
        self.fresh: list[Batch] = []

    def batch(self, batch: Batch) -> Batch:
        self.fresh.append(current_rows(batch))
        mixed = self.with_replay(batch, REPLAY, self.ratio if self.weight else 0.0, self.weight)
        if self.mean == "each" or mixed.weight is None or len(mixed) == len(batch):
            return mixed
        # Every origin's mean, times its share of the rows, is its part of the mean over all.
        share, weight = len(batch) / len(mixed), mixed.weight.clone()
        weight[: len(batch)] *= share
        weight[len(batch) :] *= 1 - share
        return mixed.replaced(weight=weight)

    def with_replay(self, batch: Batch, origin: int, ratio: float, weight: float) -> Batch:
        """The batch with `ratio` buffered rows for each current one, while replay is on and there are any."""
        count = round(ratio * len(self.fresh[-1]))
        if not count or not len(self.buffer) or len(self.context.past) + 1 < self.from_task:
            return batch
        drawn = self._draw(count)
        return batch if drawn is None else batch.joined(drawn.with_origin(origin, weight))

    def _draw(self, count: int) -> Batch | None:
        """Rows that came before this step, and with `draw_from: past` before this task; None where there are none."""
        if self.draw_from == "all" and not isinstance(self.buffer, RingReservoir):
            return self.buffer.draw(count, rounds=self.rounds)
        position = len(self.context.past) if self.draw_from == "past" else None
        step = self.context.step + 1
        if position is not None and not len(self.buffer.available(step, position)):
            return None
        if isinstance(self.buffer, RingReservoir):
            return self.buffer.draw(count, long_share=self.long_share, step=step, position=position)
        return self.buffer.draw(count, step=step, position=position)

    def step_end(self, outcome: StepOutcome) -> None:
        losses = self._losses(outcome) if self.tracks else None
        for batch in self.fresh if self.fill == "step" else ():
            own = None
            if losses is not None:
                own, losses = losses[: len(batch)], losses[len(batch) :]
            self.buffer.add(batch, loss=own, stamp=(outcome.step, len(self.context.past)))
        self.fresh.clear()

    def _losses(self, outcome: StepOutcome) -> Tensor:
        """Mean loss a prediction of every current row; the buffer is told those of its own rows."""
        batch, loss = outcome.batch, outcome.row_loss()
        if loss.ndim > 1:
            loss = loss.sum(1) / (batch.targets != IGNORE).sum(1).clamp(min=1)
        assert self.tracks is not None
        if self.tracks in batch.extra:
            self.buffer.measured(batch.extra[self.tracks], loss)
        if batch.origin is None:
            return loss
        # Sorted, not selected: how many there are would have to come from the device.
        current = (batch.origin != CURRENT).long().argsort(stable=True)
        return loss[current[: sum(len(each) for each in self.fresh)]]

    def track_losses(self, name: str) -> None:
        """Keep the lowest loss of every row beside it; `name` is this strategy's. Controllers ask for it at `setup`,
        which comes before this strategy's own."""
        self.tracks = f"{SLOT}{name}"

    def signals(self) -> dict[str, float]:
        """Rows that could be replayed now, and what `Buffer.rises` has added up, where losses are tracked."""
        position = len(self.context.past)
        ready = self.buffer.available(position=position if self.draw_from == "past" else None)
        found: dict[str, float] = {"rows": len(ready) if position + 1 >= self.from_task else 0}
        if self.tracks:
            (rise_ring, measured_ring), (rise_long, measured_long) = self.buffer.rises.tolist()
            found |= {"rise_ring": rise_ring, "measured_ring": measured_ring}
            found |= {"rise_long": rise_long, "measured_long": measured_long}
        return found

    def task_end(self, task: Task) -> None:
        if self.fill == "task_end":
            self.offer(task)


class GDumb(_Rehearsal):
    """Keep a class-balanced sample of what was seen, and answer with a fresh network trained on that alone.

    Every task begins with the weights that the run began with, and its budget of steps goes through the rows kept of
    all tasks, its own included; nothing else is trained on. What was learned before lives in the rows alone.
    """

    restarts: ClassVar[bool] = True
    fixed: ClassVar[Fixed] = "everything"
    paper = "Prabhu et al. 2020, GDumb (ECCV)"
    fidelity: ClassVar[Fidelity] = "mechanism"

    def __init__(self, *, capacity: int | None = None, capacity_bytes: int | None = None) -> None:
        """`capacity` in rows (samples, or rows of tokens) or `capacity_bytes`."""
        super().__init__(capacity=capacity, capacity_bytes=capacity_bytes, policy="class_balanced")

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.initial = {name: tensor.clone() for name, tensor in context.architecture.state_dict().items()}

    def task_start(self, task: Task) -> None:
        self.offer(task)
        weights = self.context.architecture.state_dict()
        if [t.shape for t in weights.values()] != [t.shape for t in self.initial.values()]:
            raise ValueError("GDumb: the architecture has grown since the run began, and cannot go back to its initial "
                             "weights; use one that does not grow")  # fmt: skip
        self.context.architecture.load_state_dict(self.initial)

    def train_data(self, task: Task, past: Sequence[Task]) -> Data:
        return self.buffer.data()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"initial": self.initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.initial = {name: tensor.to(self.context.device(), copy=True) for name, tensor in state["initial"].items()}


def current_rows(batch: Batch) -> Batch:
    """The rows of the current task, without those that another strategy mixed in (to find them waits for a GPU)."""
    return batch if batch.origin is None else batch.rows(batch.origin == CURRENT)
