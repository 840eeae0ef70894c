"""The means of checking an architecture: small models and rows, traced influence, one training step."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from clplat.architectures.base import Architecture, Output, StepOutcome
from clplat.streams.base import EvalSet, Spec, Task, TensorData
from clplat.streams.batch import Batch
from clplat.streams.scorers import Classify, Likelihood

EXACT = 1e-10
"""Largest difference in float64 that rounding explains."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A model to check and what it declares about itself.

    `factory(spec)` builds it; rows of 12 to 32 tokens are enough and keep the checks fast. `gradient_steps` is the
    number of optimizer steps within which every parameter gets a gradient (above 1 where something starts at
    zero or is used now and then). `overfit_steps` of Adam at `learning_rate` must learn one batch by heart.
    `isolates_documents` is False for models that look across the documents of a row on purpose.
    """

    factory: Callable[[Spec], Architecture]
    spec: Spec
    gradient_steps: int = 1
    overfit_steps: int = 150
    learning_rate: float = 1e-2
    isolates_documents: bool = True

    @property
    def language(self) -> bool:
        return self.spec.kind == "language"

    def model(self, *, double: bool = True, dropout: bool = False) -> Architecture:
        """The model with the same weights at every call, in float64 and with dropout off unless told otherwise."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.factory(self.spec)
        for module in model.modules():
            if isinstance(module, _DropoutNd) and not dropout:
                module.p = 0.0
        return model.double() if double else model

    def batch(self, rows: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
        """Random rows; those of a language begin with different tokens, so that they can be told apart."""
        draw, outputs = torch.Generator().manual_seed(seed), self.spec.num_outputs
        shape = (rows, *self.spec.input_shape)
        answers = (rows,) if self.spec.heads is None else (rows, self.spec.heads)
        targets = torch.randint(outputs, shape if self.language else answers, generator=draw)
        inputs = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        if self.spec.vocab_size is not None:
            inputs = self._padded_rows(rows, draw)
        if self.language:
            inputs = torch.randint(outputs, shape, generator=draw)
            inputs[:, 0] = torch.arange(rows) % outputs
        return Batch(inputs=inputs, targets=targets, task=torch.zeros(rows, dtype=torch.long))

    def _padded_rows(self, rows: int, draw: torch.Generator) -> Tensor:
        """Token rows (B, T) of unequal lengths, the first one full, with the stream's padding on the right."""
        length, vocab, pad = self.spec.input_shape[0], self.spec.vocab_size, self.spec.pad_token
        assert vocab is not None and pad is not None
        tokens = (pad + torch.randint(1, vocab, (rows, length), generator=draw)) % vocab
        lengths = torch.randint(2, length, (rows,), generator=draw)
        lengths[0] = length
        return tokens.masked_fill(torch.arange(length) >= lengths.unsqueeze(1), pad)

    def task(self, index: int) -> Task:
        """A task of a few random rows."""
        rows, outputs = self.batch(8, seed=index, dtype=torch.float32), self.spec.num_outputs
        data = TensorData(rows.inputs, rows.targets, task=index)
        scorer = Likelihood(token_bytes=torch.ones(outputs)) if self.language else Classify()
        return Task(
            index=index,
            name=f"task{index}",
            train=data,
            test=EvalSet(name=f"task{index}", data=data, scorer=scorer),
            classes=None if self.language else tuple(range(index * outputs // 2, (index + 1) * outputs // 2)),
            headline="loss",
        )


class _Embedded(TorchFunctionMode):
    """Makes what is looked up for `tokens` a leaf, whose gradient tells which positions reach a logit."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
        self.leaves: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is F.embedding and args[0].shape == self.tokens.shape:
            found = found.detach().requires_grad_()
            self.leaves.append(found)
        return found


def require_influence(model: Architecture, batch: Batch, allowed: Tensor) -> None:
    """Jacobian of logits by embeddings: exactly 0 outside `allowed` (B, T, T), not 0 at a token's own position."""
    with _Embedded(batch.inputs) as embedded:
        logits = model(batch).logits
    require(bool(embedded.leaves), model, "no nn.Embedding or F.embedding looks up batch.inputs: cannot trace tokens")
    probe = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    for position in range(logits.shape[1]):
        found = torch.autograd.grad(
            (logits[:, position] @ probe).sum(), embedded.leaves, retain_graph=True, allow_unused=True
        )
        reach = torch.stack([part.abs().sum(-1) for part in found if part is not None]).sum(0)
        seen = reach.masked_fill(allowed[:, position], 0.0).nonzero().tolist()
        require(not seen, model, f"logits at {position} depend on hidden tokens (row, position): {seen[:4]}")
        require(bool((reach[:, position] > 0).all()), model, f"logits at {position} ignore their own token")


def answers(model: Architecture, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch).logits


def loss_of(output: Output, batch: Batch) -> Tensor:
    logits = output.logits.flatten(0, batch.targets.ndim - 1).float()
    return F.cross_entropy(logits, batch.targets.flatten()) + sum(output.losses.values())


def train_step(model: Architecture, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> float:
    """One step as the learner takes it; returns the loss before it."""
    optimizer.zero_grad()
    output = model(batch)
    loss = loss_of(output, batch)
    loss.backward()
    optimizer.step()

    def row_loss() -> Tensor:
        logits = output.logits.detach().flatten(0, batch.targets.ndim - 1)
        return F.cross_entropy(logits, batch.targets.flatten(), reduction="none").view_as(batch.targets)

    model.step_end(StepOutcome(step=step + 1, batch=batch, output=output, row_loss=row_loss))
    return float(loss.detach())


def saved(value: Any) -> Any:
    """The value after torch.save and a load that executes nothing."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def require_equal(found: Tensor, expected: Tensor, model: nn.Module, message: str) -> None:
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    require(difference <= EXACT, model, f"{message}: they differ by {difference:.3g}")


def require(condition: bool, model: nn.Module, message: str) -> None:
    if not condition:
        raise AssertionError(f"{type(model).__name__}: {message}")
