"""Hypernetworks as architectures: a generator, task embeddings, and the target network that they give weights to.

clplat run benchmarks/split_digits_hypernetwork
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clplat.architectures.base import Architecture, Output, State
from clplat.architectures.hypernetwork.generators import (
    ChunkedGenerator,
    Generator,
    Order,
    RecurrentGenerator,
    check_sizes,
)
from clplat.architectures.hypernetwork.target import Target, check_chunk, segments
from clplat.streams.base import Spec, Task
from clplat.streams.batch import Batch

FirstEmbedding = Literal["random", "previous"]


class _Hypernetwork(Architecture):
    """Weights of task t: W_t = offset + scale × generator(e_t), with a learned embedding e_t for every task.

    Each row is answered with the weights of its task. In the `class` and `domain` scenarios evaluation hides the task:
    a row is answered by the task whose answer to it has the lowest entropy. Embeddings of earlier tasks are frozen
    when the next one starts; a task that has not started yet is answered with the latest embedding.

    `scale` and `offset` are set once, so that at the beginning the first task's weights have in every tensor the
    standard deviation with which the target initialises that tensor itself: the measured root mean square of each
    generated chunk is divided out. Tensors that the target begins as a constant are that constant ± 0.1.
    """

    frozen: ClassVar[tuple[str, ...]] = ("past_embeddings",)

    def __init__(
        self, *, spec: Spec, target: Target, generator: Generator, task_embedding: int, first_embedding: FirstEmbedding
    ) -> None:
        super().__init__()
        self.target, self.generator, self.first_embedding = target, generator, first_embedding
        self.hides_task = spec.scenario != "task"
        # A class attribute by contract; here the target's, so the instance's own.
        self.__dict__["batch_coupled"] = getattr(target.model, "batch_coupled", False)
        self.past_embeddings = nn.Parameter(torch.empty(0, task_embedding), requires_grad=False)
        self.embeddings = nn.Parameter(torch.randn(1, task_embedding))
        self.stages, self.started = [0], 0
        # What growth draws from: the same on all processes, and in a run that is taken up again.
        self.seed = int(torch.randint(2**62, ()))
        pieces = segments(target.lengths, generator.chunk_size)
        self.register_buffer("lengths", torch.tensor([size for *_, size in pieces]), persistent=False)
        self.register_buffer("offset", torch.tensor([target.offset[tensor] for tensor, *_ in pieces]))
        self.register_buffer("scale", self._measured_scale(pieces))
        self.lengths: Tensor
        self.offset: Tensor
        self.scale: Tensor

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C); `hidden` is the target's."""
        if batch.task is None or (self.hides_task and not self.training):
            return self._inferred(batch)
        if self.generator.num_stages == 1 and (len(batch) == 1 or batch.task.stride(0) == 0):
            # Rows of one task, known as such without asking the device which.
            return self._answered(batch.task[:1].clamp(max=len(self.stages) - 1), 0, batch, return_hidden)
        latest = len(self.stages) - 1
        tasks = batch.task.clamp(max=latest)
        found = tasks.unique().tolist()
        if len(found) == 1:
            return self._answered(tasks[:1], self.stages[found[0]], batch, return_hidden)
        return self._mixed(batch, tasks, found, return_hidden)

    def task_start(self, task: Task) -> None:
        """Freeze the embeddings of tasks that have been trained, and begin new ones; grows where the generator does."""
        frozen = min(task.index, self.started)
        if self.started and task.index >= self.started:
            self.grow(torch.Generator().manual_seed(self.seed + task.index + 1))
        self._resize(max(task.index + 1, len(self.stages)), frozen)
        self.started = len(self.stages)

    def grow(self, draw: torch.Generator) -> None:
        """Widen the generator for the tasks to come, if it can be; random numbers from `draw` (CPU)."""

    def structure(self) -> Mapping[str, Any]:
        return {"stages": list(self.stages), "started": self.started, "frozen": len(self.past_embeddings)}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        while self.generator.num_stages <= structure["stages"][-1]:
            self.grow(torch.Generator().manual_seed(0))  # the weights are loaded next
        self._resize(len(structure["stages"]), structure["frozen"])
        self.stages, self.started = list(structure["stages"]), structure["started"]

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The generator's trainable parameters by name; task embeddings are nobody else's."""
        return {name: p for name, p in self.generator.named_parameters() if p.requires_grad}

    def generated_weights(self, tasks: Sequence[int], parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Flat weights (N, W) of the target for some tasks, by the generator as it is or with other `parameters`."""
        table = self._embedding_table()
        by_stage: dict[int, list[int]] = {}
        for task in tasks:
            by_stage.setdefault(self.stages[task], []).append(task)
        parts = [self._weights(table[group], stage, parameters) for stage, group in by_stage.items()]
        grouped = [task for group in by_stage.values() for task in group]
        weights = torch.cat(parts) if len(parts) != 1 else parts[0]
        return weights if grouped == list(tasks) else weights[[grouped.index(task) for task in tasks]]

    def answer_with(self, weights: Tensor, batch: Batch, task: int) -> Output:
        """The target's answer with given flat weights (W,), in evaluation, with the buffers kept for the task."""
        statistics = {name: kept[task] for name, kept in self.target.of_tasks().items()}
        return self.target.answer(weights, statistics, batch)

    def flops_per_row(self) -> float:
        """The target's alone: weights are generated once a batch and task, whatever its rows."""
        return self.target.flops

    def _answered(self, row: Tensor, stage: int, batch: Batch, return_hidden: str | None) -> Output:
        """All rows by the task in `row` (1,)."""
        weights = self._weights(self._embedding_table()[row], stage)[0]
        statistics = {name: kept[0] for name, kept in self.target.of_tasks(row).items()}
        output = self.target.answer(weights, statistics, batch, return_hidden)
        if self.training:
            self.target.keep(row, statistics)
        return output

    def _mixed(self, batch: Batch, tasks: Tensor, found: Sequence[int], return_hidden: str | None) -> Output:
        """Rows of several tasks, a pass over those of each (which of them has how many, a GPU has to be asked)."""
        places = [(tasks == task).nonzero().squeeze(1) for task in found]
        outputs = [
            self._answered(tasks[rows[:1]], self.stages[task], batch.rows(rows), return_hidden)
            for task, rows in zip(found, places)
        ]
        back = torch.cat(places).argsort()
        shares = [len(rows) / len(batch) for rows in places]
        names = {name for output in outputs for name in output.losses}
        hidden = [output.hidden for output in outputs if output.hidden is not None]
        return Output(
            logits=torch.cat([output.logits for output in outputs])[back],
            losses={n: torch.stack([s * o.losses[n] for s, o in zip(shares, outputs)]).sum() for n in names},
            hidden=torch.cat(hidden)[back] if hidden else None,
        )

    def _inferred(self, batch: Batch) -> Output:
        """Every row by the task that is surest of it, all tasks in one pass."""
        if self.training:
            raise ValueError(f"{type(self).__name__}: rows without a task cannot be trained on; give batch.task")
        weights, kept = self.generated_weights(range(len(self.stages))), self.target.of_tasks()

        def logits(own: Tensor, statistics: dict[str, Tensor]) -> Tensor:
            return self.target.answer(own, statistics, batch).logits

        if len(weights) == 1:
            return self.target.answer(weights[0], {name: tensor[0] for name, tensor in kept.items()}, batch)
        # The fused forms of attention have no batching rule; the plain form has.
        with sdpa_kernel(SDPBackend.MATH):
            logits_TBC = vmap(logits)(weights, kept)
        chosen = entropy(logits_TBC).argmin(0)
        return Output(logits=logits_TBC[chosen, torch.arange(len(batch), device=chosen.device)])

    def _weights(self, embeddings: Tensor, stage: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        raw = functional_call(self.generator, dict(parameters or {}), (embeddings, stage))
        raw, total = raw[:, : self.target.num_weights], self.target.num_weights
        scale, offset = (v.repeat_interleave(self.lengths, output_size=total) for v in (self.scale, self.offset))
        return torch.addcmul(offset, raw, scale)

    def _embedding_table(self) -> Tensor:
        return torch.cat([self.past_embeddings, self.embeddings])

    def _resize(self, num_tasks: int, frozen: int) -> None:
        """`num_tasks` embeddings, the first `frozen` of them without gradient."""
        table = self._embedding_table().detach()
        fresh = [self._first_embedding(table, index) for index in range(len(table), num_tasks)]
        table = torch.cat([table, *fresh])
        self.past_embeddings = nn.Parameter(table[:frozen].clone(), requires_grad=False)
        self.embeddings = nn.Parameter(table[frozen:].clone())
        self.stages += [self.generator.num_stages - 1] * len(fresh)
        self.target.grow(num_tasks)

    def _first_embedding(self, table: Tensor, index: int) -> Tensor:
        if self.first_embedding == "previous":
            return table[-1:]
        draw = torch.Generator().manual_seed(self.seed - index)
        return torch.randn(1, table.shape[1], generator=draw).to(table)

    @torch.no_grad()
    def _measured_scale(self, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
        raw = self.generator(self.embeddings, 0).view(self.generator.num_steps, -1)
        size = raw.square().mean(1).sqrt()
        return torch.tensor([self.target.deviation[tensor] for tensor, *_ in pieces]) / size[[c for _, c, _ in pieces]]


class ChunkedHypernetwork(_Hypernetwork):
    """An MLP generates the target's weights chunk by chunk, from the task's embedding and the chunk's."""

    paper = "von Oswald et al. 2020, arXiv:1906.00695"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        target: Callable[[Spec], Architecture],
        chunk_size: int = 1000,
        task_embedding: int = 32,
        chunk_embedding: int = 32,
        hidden_sizes: list[int] | None = None,
        first_embedding: FirstEmbedding = "random",
    ) -> None:
        """`target`: the network that answers, a component (its `spec` is the stream's). `chunk_size` weights are
        generated at once. `hidden_sizes` of the generator default to [32, 64]; empty for a linear one. A new task's
        embedding is drawn anew, or begins as the one before it (`previous`)."""
        sizes = [32, 64] if hidden_sizes is None else hidden_sizes
        check_sizes(chunk_size=chunk_size, task_embedding=task_embedding, chunk_embedding=chunk_embedding,
                     hidden_sizes=min(sizes, default=1))  # fmt: skip
        emptied = _target(target, spec)
        check_chunk(chunk_size, emptied.num_weights)
        generator = ChunkedGenerator(
            num_weights=emptied.num_weights, chunk_size=chunk_size, task_embedding=task_embedding,
            chunk_embedding=chunk_embedding, hidden_sizes=sizes,
        )  # fmt: skip
        super().__init__(
            spec=spec, target=emptied, generator=generator, task_embedding=task_embedding,
            first_embedding=first_embedding,
        )  # fmt: skip


class RecurrentHypernetwork(_Hypernetwork):
    """An LSTM generates the target's weights in the order of its layers, each chunk knowing those before it."""

    paper = "Chandra et al. 2023, arXiv:2209.07712"
    fidelity = "interpretation"

    generator: RecurrentGenerator

    def __init__(
        self,
        *,
        spec: Spec,
        target: Callable[[Spec], Architecture],
        chunk_size: int = 1000,
        task_embedding: int = 32,
        chunk_embedding: int = 32,
        hidden_size: int = 64,
        order: Order = "depth",
        recurrent: bool = True,
        grow_by: int = 0,
        freeze_grown: bool = True,
        first_embedding: FirstEmbedding = "random",
    ) -> None:
        """As `ChunkedHypernetwork`, with `hidden_size` units. `order` and `recurrent` are ablations: chunks in a random
        order, and no memory from step to step. With `grow_by`, every task after the first adds that many units, which
        read the old ones and are not read by them; `freeze_grown` then leaves the old units, chunk embeddings and the
        output's bias as they are, so that earlier tasks keep their weights bit for bit. Without it they go on learning,
        and a regularizer has to hold earlier tasks."""
        check_sizes(chunk_size=chunk_size, task_embedding=task_embedding, chunk_embedding=chunk_embedding,
                     hidden_size=hidden_size)  # fmt: skip
        if grow_by < 0:
            raise ValueError(f"grow_by: must not be negative, got {grow_by}")
        self_frozen = grow_by > 0 and freeze_grown
        emptied = _target(target, spec)
        check_chunk(chunk_size, emptied.num_weights)
        generator = RecurrentGenerator(
            num_weights=emptied.num_weights, chunk_size=chunk_size, task_embedding=task_embedding,
            chunk_embedding=chunk_embedding, hidden_size=hidden_size, order=order, recurrent=recurrent,
        )  # fmt: skip
        super().__init__(
            spec=spec, target=emptied, generator=generator, task_embedding=task_embedding,
            first_embedding=first_embedding,
        )  # fmt: skip
        self.grow_by, self.freeze_grown = grow_by, self_frozen

    def grow(self, draw: torch.Generator) -> None:
        if self.grow_by:
            self.generator.add_stage(self.grow_by, draw)
            if self.freeze_grown:
                self.generator.freeze()


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p in nats over the last dimension, in float32 at least."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _target(target: Callable[[Spec], Architecture], spec: Spec) -> Target:
    if spec.kind != "classify":
        raise ValueError("target: hypernetworks classify; this stream is a language, whose models carry state")
    # By keyword, which is how components take it.
    model = target(spec=spec)  # type: ignore[call-arg]
    if isinstance(model, _Hypernetwork):
        raise ValueError(f"target: {type(model).__name__} generates weights itself; name the network that answers, "
                         "for example MLP")  # fmt: skip
    return Target(model)
