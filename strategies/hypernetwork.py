"""The output regularizer of hypernetworks: generated weights of earlier tasks stay where they were."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture, GeneratesWeights, Output, State
from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.strategies.fisher import fisher_diagonal
from clplat.strategies.weights import evaluating
from clplat.streams.base import Task
from clplat.streams.batch import Batch


class HypernetworkRegularizer(Strategy):
    """β/(T−1) Σ_{t<T} ‖H(e_t; Θ*) − H(e_t; Θ + ΔΘ)‖², the squared norm a sum over the weights of the target.

    Θ* is the generator as the task T found it. ΔΘ is the step that the optimizer would take for the task's loss alone,
    held constant. The gradient is added to that of the task's loss, so it is no part of the logged loss. It reaches the
    generator's shared parameters alone: an embedding is trained by its own task's loss only.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    paper = "von Oswald et al. 2020, arXiv:1906.00695, Eq. 2"
    fidelity: ClassVar[Fidelity] = "exact"

    def __init__(
        self,
        *,
        strength: float,
        lookahead: bool = True,
        tasks_per_step: int | None = None,
        importance: bool = False,
        fisher_samples: int | None = 256,
        fisher_batch_size: int = 16,
    ) -> None:
        """`strength` is β. Without `lookahead` ΔΘ is 0. `tasks_per_step` earlier tasks are drawn at every step and β is
        shared among them (None: all). With `importance` the square of each weight's change is weighted by the
        Fisher information that its task has of it, estimated at the task's end on `fisher_samples` rows (None: all),
        `fisher_batch_size` at once, and brought to 0.5 + 0.5 min(F / mean F, 10); one number a weight and task is
        kept."""
        if strength < 0:
            raise ValueError(f"strength: must not be negative, got {strength}")
        sizes = (tasks_per_step, fisher_samples, fisher_batch_size)
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError("tasks_per_step, fisher_samples, fisher_batch_size: must be at least 1, "
                             f"got {tasks_per_step}, {fisher_samples} and {fisher_batch_size}")  # fmt: skip
        self.strength, self.lookahead, self.tasks_per_step, self.importance = (
            strength, lookahead, tasks_per_step, importance,
        )  # fmt: skip
        self.fisher_samples, self.fisher_batch_size = fisher_samples, fisher_batch_size
        self.tasks: list[int] = []
        self.targets: Tensor | None = None
        self.importances: dict[int, Tensor] = {}

    def setup(self, context: Context) -> None:
        super().setup(context)
        if not isinstance(context.architecture, GeneratesWeights):
            raise ValueError(
                f"HypernetworkRegularizer: {type(context.architecture).__name__} generates no weights; give an "
                "architecture that does, ChunkedHypernetwork or RecurrentHypernetwork, with this one as its target"
            )
        self.model: GeneratesWeights = context.architecture

    @torch.no_grad()
    def task_start(self, task: Task) -> None:
        self.tasks = [earlier.index for earlier in self.context.past]
        self.targets = self.model.generated_weights(self.tasks) if self.tasks else None

    def gradient(self) -> None:
        shared = self.model.shared_parameters()
        if not self.strength or self.targets is None or not shared:
            return
        parameters = list(shared.values())
        at = candidates(self.context.optimizer(), parameters) if self.lookahead else parameters
        moved = [place.detach().clone().requires_grad_() for place in at]
        # In full precision also where the loss is not: what is penalised is a small difference.
        with torch.enable_grad(), torch.autocast(moved[0].device.type, enabled=False):
            penalty = self._penalty(dict(zip(shared, moved, strict=True)))
        if not penalty.requires_grad:
            return  # all that earlier tasks are generated from is frozen
        gradients = torch.autograd.grad(penalty, moved, materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The regularizer with `parameters` in place of Θ + ΔΘ."""
        assert self.targets is not None
        places: Sequence[int] = range(len(self.tasks))
        if self.tasks_per_step is not None and self.tasks_per_step < len(self.tasks):
            drawn = torch.randperm(len(self.tasks), generator=self.context.generator)[: self.tasks_per_step]
            places = sorted(drawn.tolist())
        apart = self.model.generated_weights([self.tasks[place] for place in places], parameters)
        square = (apart - (self.targets if len(places) == len(self.tasks) else self.targets[places])).square()
        if self.importances:
            # A task that ended while the strength was 0 has none.
            one = torch.ones_like(square[0])
            square = square * torch.stack([self.importances.get(self.tasks[place], one) for place in places])
        return self.strength / len(places) * square.sum()

    def task_end(self, task: Task) -> None:
        if not self.importance or not self.strength:
            return
        with torch.no_grad():
            weights = self.model.generated_weights([task.index])[0]
        answering = _Answering(self.model, weights, task.index)
        with evaluating(self.context.architecture):
            fisher = fisher_diagonal(
                replace(self.context, architecture=answering), task, samples=self.fisher_samples, labels="sampled",
                batch_size=self.fisher_batch_size, per_sample=True,
            )  # fmt: skip
        share = fisher / fisher.mean().clamp(min=torch.finfo(fisher.dtype).tiny)
        self.importances[task.index] = 0.5 + 0.5 * share.clamp(max=10.0)

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks), "targets": self.targets, "importances": dict(self.importances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.context.device()
        self.tasks, targets = list(state["tasks"]), state["targets"]
        self.targets = None if targets is None else targets.to(device, copy=True)
        self.importances = {task: kept.to(device, copy=True) for task, kept in state["importances"].items()}


@torch.no_grad()
def candidates(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Where the optimizer would bring `parameters`, given the gradients as they are; nothing is changed.

    The optimizer itself takes the step, on copies of its weights and of its state, so that this holds for every
    optimizer that needs no closure: what it costs is one step and two copies of what it keeps.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    own, state = [p.data for p in weights], optimizer.state
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        for weight in weights:
            weight.data = weight.data.clone()
        optimizer.state = defaultdict(dict, {p: _copied(kept) for p, kept in state.items()})
        optimizer.step()
        return [p.data for p in parameters]
    finally:
        optimizer.state = state
        for weight, data in zip(weights, own, strict=True):
            weight.data = data
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.update(option)


def _copied(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for name, v in kept.items()}


class _Answering(Architecture):
    """The target of one task as a model whose only parameters are its generated weights (W,)."""

    def __init__(self, model: GeneratesWeights, weights: Tensor, task: int) -> None:
        super().__init__()
        self.weights, self.task = nn.Parameter(weights), task
        self._model = (model,)  # no submodule: its parameters are not this one's

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        return self._model[0].answer_with(self.weights, batch, self.task)
