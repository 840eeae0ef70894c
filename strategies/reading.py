"""Reading at test time: the score of every chunk before it is learned, and the rivals of a memory that learns it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat.architectures.base import Adapters, Output
from clplat.strategies.base import Context, Strategy
from clplat.strategies.reference import refuse_learners
from clplat.streams.base import Task
from clplat.streams.batch import IGNORE, Batch


class Prequential(Strategy):
    """Scores every chunk of a text before anything learns from it: the loss of a reader who learns while reading.

    Works with every architecture and beside every other strategy, behind which it must not stand. The record has, at
    each task boundary, `loss` (nats a token over all tokens so far), `ppl` = exp(loss), `ppl_chunk_mean` (the mean over
    chunks of their own perplexities, which Temp-LoRA's script reports; the larger of the two) and, by task, the
    perplexity of that part: by position, where tasks are parts of a book. Training does not notice.
    """

    def setup(self, context: Context) -> None:
        """Refuse whatever would let a chunk be learned before it is scored."""
        super().setup(context)
        if next(iter(context.strategies.values()), self) is not self:
            raise ValueError("Prequential: must be the first of the strategies, so that none learns from a chunk "
                             "before it is scored")  # fmt: skip
        if not all(getattr(task.train, "ordered", False) for task in context.tasks):
            raise ValueError("Prequential: needs rows that come in their order; use a stream that is read "
                             "(BookStream, DialogueQAStream)")  # fmt: skip
        if context.batch_size != 1 or context.world.size > 1:
            raise ValueError("Prequential: a batch must hold one chunk, and one process read it; set batch_size: 1 and "
                             "devices: 1")  # fmt: skip
        self.batches = 0
        # For each task: nats, tokens, the sum of the chunks' perplexities, chunks.
        self.sums = torch.zeros(len(context.tasks), 4, dtype=torch.float64)

    def task_start(self, task: Task) -> None:
        self.batches = 0

    def batch(self, batch: Batch) -> Batch:
        """Score a chunk that comes for the first time, as evaluation would: without dropout and gradients."""
        task = self.context.task
        assert task is not None
        if self.batches % int(getattr(task.train, "passes", 1)) == 0:
            nats, count = self._scored(batch)
            found = torch.stack([nats, count, (nats / count).exp(), torch.ones_like(nats)])
            self.sums = self.sums.to(found.device)
            self.sums[task.index] += found
        self.batches += 1
        return batch

    @torch.no_grad()
    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats and target tokens of a chunk."""
        architecture = self.context.architecture
        training = architecture.training
        architecture.eval()
        nats = self.context.row_loss(architecture(batch), batch).double().sum()
        architecture.train(training)
        return nats, (batch.targets != IGNORE).sum().double()

    def measurements(self) -> Mapping[str, float]:
        sums = self.sums.tolist()
        nats, tokens, perplexities, chunks = (sum(column) for column in zip(*sums, strict=True))
        if not tokens:
            return {}
        found = {"loss": nats / tokens, "ppl": math.exp(nats / tokens), "ppl_chunk_mean": perplexities / chunks}
        for task, (nats, tokens, _, _) in zip(self.context.tasks, sums, strict=True):
            if tokens:
                found[f"ppl/{task.name}"] = math.exp(nats / tokens)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "sums": self.sums.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches, self.sums = state["batches"], state["sums"].clone()


class TempLoRA(Strategy):
    """Temp-LoRA (Wang et al. 2024, arXiv:2401.11504): a low-rank adapter learns a text while it is read, and is thrown
    away behind it. Give the architecture `lora` on every linear layer.

    `fresh`: `never`, one adapter for all tasks (parts of one book), or `task`, a new one for each (dialogues)."""

    paper = "Wang et al. 2024, arXiv:2401.11504"
    fidelity = "mechanism"

    def __init__(self, *, fresh: Literal["never", "task"] = "never") -> None:
        if fresh not in ("never", "task"):
            raise ValueError(f"fresh: must be never or task, got {fresh!r}")
        self.fresh = fresh

    def setup(self, context: Context) -> None:
        """Refuse an architecture without adapters."""
        super().setup(context)
        model = context.architecture
        if not isinstance(model, Adapters) or not model.trained:
            raise ValueError(f"TempLoRA: {type(model).__name__} has no adapter; use Pretrained or Adapted with lora")
        if not all(name.endswith(("lora_A", "lora_B")) for name in self._tensors(model)):
            raise ValueError(f"TempLoRA: the adapters of {type(model).__name__} are not low-rank ones; use Pretrained "
                             "or Adapted with lora")  # fmt: skip

    @torch.no_grad()
    def task_start(self, task: Task) -> None:
        """A new adapter, where the last one's text is over."""
        if self.fresh == "never" or not self.context.past:
            return
        model = self.context.architecture
        assert isinstance(model, Adapters), "checked at setup"
        for name, tensor in self._tensors(model).items():
            if name.endswith("lora_B"):
                tensor.zero_()
            else:
                drawn = torch.empty(tensor.shape)
                # As torch, and so peft, draws a linear layer.
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=self.context.generator)
                tensor.copy_(drawn)

    def _tensors(self, model: Adapters) -> dict[str, nn.Parameter]:
        return {name: p for adapter in model.trained for name, p in model.adapter_parameters(adapter).items()}


class Truncation(Strategy):
    """Nothing is learned: what a model knows of a text is what fits in its window. The frozen arm of reading at test
    time. Each step only computes the loss."""

    trains = False

    def setup(self, context: Context) -> None:
        """Refuse whatever would learn beside it."""
        super().setup(context)
        refuse_learners(self, context, Prequential)

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Output]:
        with torch.no_grad():
            output = self.context.architecture(batch)
            return self.context.loss(output, batch), output
