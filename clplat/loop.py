"""One run: the loop over tasks, and how it starts again where it was stopped.

A run folder holds its resolved `config.yaml`, the journal, checkpoints and artifacts; `execute(folder)` starts
the run or takes it up where its last checkpoint stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from clplat.assembly import Parts, assemble, load_weights
from clplat.checkpoint import Checkpoints, write
from clplat.config import RunConfig, difference, parse, plain
from clplat.costs import Costs
from clplat.early_end import check_early_ends
from clplat.errors import ConfigError, Interrupted
from clplat.fitting import fit
from clplat.interruption import Interruption
from clplat.journal import Journal
from clplat.metrics import summary
from clplat.observing import observe
from clplat.precision import keep_weights
from clplat.progress import Progress
from clplat.randomness import global_state, restore_global, seed_global
from clplat.record import check_data, describe
from clplat.result_table import ResultTable
from clplat.sharding import Sharded
from clplat.strategies.stored_rows import stored_fields
from clplat.strategies.world import World
from clplat.streams.base import Budget, Task


class Run:
    """The task loop and everything that has to survive an interruption.

    `phase` is where the loop stands with the task at `position` of the path: before (nothing scored yet), start,
    train, end, eval; a checkpoint taken in any phase leads back into it. `journal` is None on all ranks but zero.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        journal: Journal | None,
        interruption: Interruption,
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.journal, self.interruption = journal, interruption
        self.world = World.current()
        self.parts: Parts = assemble(config, self.world)
        self.checkpoints = Checkpoints(folder, every_seconds=config.checkpoint.every_seconds)
        # As a buffer keeps rows (int32 tokens, inputs and targets): a share compares like with like. Known before the
        # run's random source is set, from which a user's rows may draw.
        one_row = stored_fields(self.parts.stream.tasks[0].train.batch(torch.tensor([0]))).values()
        rows = sum(len(task.train) for task in self.parts.stream.tasks)
        self.stream_bytes = rows * sum(tensor.nbytes for tensor in one_row)
        self.sharded: Sharded | None = None
        self.table, self.costs = ResultTable(), Costs()
        self.costs.start_memory()
        self.path: Sequence[Task] = self.parts.hooks.select_tasks(self.parts.stream.tasks)
        check_early_ends(config, self.path)
        self.phase, self.position = "before", 0
        self.seen: list[int] = []
        self.forgetting: dict[str, float] = {}
        seed_global(config.seed, "model", self.world.rank)
        check_data(self.parts, folder)
        if journal is not None:
            describe(journal, config, self.parts, folder)

    def execute(self) -> ResultTable:
        """Train through the stream from where the last checkpoint stopped, scoring every task after every task."""
        self.restore()
        hooks, architecture = self.parts.hooks, self.parts.architecture
        if self.phase == "before":
            self.score(row=0)
            self.enter("start")
        while self.position < len(self.path):
            task = self.path[self.position]
            self.parts.context.task, self.parts.context.past = task, self.path[: self.position]
            if self.phase == "start":
                architecture.task_start(task)
                keep_weights(architecture, self.config.training.precision)
                hooks.task_start(task)
                observe(self, "start", hooks.controllers)
                self.enter("train")
            if self.phase == "train":
                fit(self, task)
                self.enter("end")
            if self.phase == "end":
                with self.costs.timed("boundary"):
                    hooks.task_end(task)
                self.enter("eval")
            self.seen = self.tasks_seen(task)
            self.score(row=task.index + 1)
            self.snapshot(task)
            self.position += 1
            self.enter("start")
        self.parts.learner.all_trained()
        self.save("done")
        return self.table

    def enter(self, phase: str) -> None:
        """Go on to a phase; save when the last checkpoint is old enough."""
        self.phase = phase
        if phase == "start":
            self.parts.learner.batches = 0
        stop = self.agreed(self.interruption.requested is not None)
        if self.agreed(self.checkpoints.due()) or stop:
            self.save(phase)
        if stop:
            self.interruption.leave()

    def agreed(self, mine: bool) -> bool:
        """What rank zero says, so that all processes save and stop together."""
        if self.world.size == 1:
            return mine
        return bool(self.world.broadcast(torch.tensor([mine], device=self.parts.device)))

    def tasks_seen(self, task: Task) -> list[int]:
        """Indices of the tasks trained on, `task` included; a path that skips tasks has seen all up to it."""
        return [other.index for other in self.parts.stream.tasks if other.index <= task.index]

    def score(self, row: int) -> None:
        """Fill one row of the result table, and tell journal, controllers and whoever watches."""
        with self.costs.timed("evaluation"):
            try:
                probes = self.config.evaluation.probes == "always" or row == 0 or self.position == len(self.path) - 1
                cells = self.parts.evaluator.cells(self.seen, self.leave_if_asked, probes=probes)
            except Interrupted:
                self.save(self.phase)
                raise
            measured = {f"model/{name}": value for name, value in self.parts.architecture.measurements().items()}
            measured |= self.parts.hooks.measurements()
        step = self.parts.learner.global_steps
        self.table.add(row, step, cells)
        self.forgetting = self.table.forgetting_by_task()
        if self.journal is not None:
            self.costs.measure_memory()
            self.journal.results(row, step, cells)
            if facts := self.parts.architecture.facts():
                self.journal.tags({f"architecture.{name}": value for name, value in facts.items()})
            self.journal.metrics(step, self.costs_now() | measured | {"task_position": float(row)})
            self.journal.flush()
        if row:
            observe(self, "boundary", self.parts.hooks.controllers)
        self.progress.boundary(row, summary(self.table))

    def leave_if_asked(self) -> None:
        """Between sets of an evaluation; several processes leave together at the next phase instead."""
        if self.world.size == 1 and self.interruption.requested is not None:
            self.interruption.leave()

    def costs_now(self) -> dict[str, float]:
        """Cost totals, with what replay holds as a share of what all training rows would take in a buffer."""
        stored, architecture = self.parts.hooks.stored_bytes(), self.parts.architecture
        return self.costs.metrics(tokens_per_row=self.parts.stream.tasks[0].train.tokens_per_row) | {
            "cost/buffer_bytes": float(stored),
            "cost/buffer_share": stored / self.stream_bytes,
            # Now, not when the run began: strategies bring adapters and prompts task by task.
            "cost/parameters": float(sum(p.numel() for p in architecture.parameters())),
            "cost/active_parameters": float(architecture.active_parameters()),
        }

    def budget(self, task: Task) -> Budget:
        """The task's own budget where the stream gives one, else the study's."""
        return task.budget or self.config.training.budget

    def save(self, label: str) -> None:
        """A checkpoint of everything; every process takes part, rank zero writes."""
        with self.whole(torch.device("cpu") if self.sharded else self.parts.device):
            self.parts.learner.check_weights(self.parts.architecture)
            state = self.state()
        if self.journal is not None:
            self.journal.flush()
            self.checkpoints.save(state, label)

    def whole(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it the architecture is whole, which it is not while a task is trained on sharded weights."""
        return nullcontext() if self.sharded is None else self.sharded.whole(device)

    def snapshot(self, task: Task) -> None:
        """Keep the weights after this task where the configuration asks for it."""
        if self.config.checkpoint.snapshots == "boundary" and self.journal is not None:
            (self.folder / "snapshots").mkdir(exist_ok=True)
            for old in (self.folder / "snapshots").glob(f"{task.index + 1:03d}-*.pt"):
                old.unlink()
            write(self.weights(), self.folder / "snapshots" / f"{task.index + 1:03d}-weights")

    def weights(self) -> dict[str, Any]:
        """Structure and weights of the architecture as they now are."""
        architecture = self.parts.architecture
        return {"structure": dict(architecture.structure()), "architecture": architecture.state_dict()}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain data."""
        learner = self.parts.learner
        return self.weights() | {
            "config": plain(self.config),
            "phase": self.phase,
            "position": self.position,
            "seen": list(self.seen),
            "batches": learner.batches,
            "global_steps": learner.global_steps,
            "window": {name: list(values) for name, values in learner.window.items()},
            "observed": learner.observed,
            "carried": learner.carried,
            "optimizer": learner.live_optimizer_state(),
            "scaler": learner.live_scaler_state(),
            "strategies": self.parts.hooks.state_dict(),
            "random": self.world_random_state(),
            "strategy_random": self.parts.context.generator.get_state(),
            "table": self.table.state_dict(),
            "costs": dataclasses.asdict(self.costs),
        }

    def world_random_state(self) -> list[dict[str, Any]]:
        """The global random sources of every process, in rank order."""
        if self.world.size == 1:
            return [global_state()]
        import torch.distributed as dist

        states: list[Any] = [None] * self.world.size
        dist.all_gather_object(states, global_state())
        return states

    def restore(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        state = self.checkpoints.load()
        if state is None:
            return
        changed = difference(parse(RunConfig, state["config"]), self.config)
        if changed:
            raise ConfigError(
                f"{self.folder}: its checkpoint was made under another configuration ({'; '.join(changed)}); "
                "undo the change to config.yaml or start a new run"
            )
        learner, hooks = self.parts.learner, self.parts.hooks
        load_weights(self.parts.architecture, state, self.config.training.precision)
        self.phase, self.position, self.seen = state["phase"], state["position"], list(state["seen"])
        learner.batches, learner.global_steps = state["batches"], state["global_steps"]
        learner.window = {n: [v.to(self.parts.device) for v in values] for n, values in state["window"].items()}
        learner.observed, learner.carried = state["observed"], state["carried"]
        learner.optimizer_state, learner.scaler_state = state["optimizer"], state["scaler"]
        self.parts.context.step = learner.global_steps
        if self.position < len(self.path):
            self.parts.context.task, self.parts.context.past = self.path[self.position], self.path[: self.position]
        hooks.load_state_dict(state["strategies"])
        self.table = ResultTable.from_state(state["table"])
        self.forgetting = self.table.forgetting_by_task()
        self.costs.load(state["costs"])
        saved = state["random"]
        restore_global(saved[min(self.world.rank, len(saved) - 1)])
        self.parts.context.generator.set_state(state["strategy_random"])
