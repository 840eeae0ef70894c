"""Training with weights that several processes hold a share of each (FSDP).

While a task is trained, a twin of the architecture takes its place whose weights, gradients and optimizer state are
sharded over the processes (torch's `fully_shard`: each block's weights come together only while it computes). Whoever
needs the model as one, evaluation, checkpoints and what strategies do between tasks, has the architecture itself, which
is given the twin's weights: a process then holds all weights once, and never their gradients or the optimizer's state.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from clplat.architectures.base import Architecture, Output
from clplat.components import resolve
from clplat.config import TrainingConfig
from clplat.errors import ConfigError
from clplat.hooks import Hooks

if TYPE_CHECKING:
    from clplat.loop import Run

OPTIMIZERS = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta")
"""Of torch.optim: what they do to a weight depends on that weight and its gradient alone."""


def check_sharding(training: TrainingConfig, hooks: Hooks, architecture: Architecture) -> None:
    """Refuse, before any work, what would need weights or gradients whole that no process has."""
    if training.sharding == "none":
        return
    if training.devices == 1:
        raise _refused("training.devices", "1 process has all weights", "set it to 2 or more")
    for name, strategy in hooks.strategies.items():
        # Of the class itself: what a subclass adds may read the weights again.
        if not vars(type(strategy)).get("shards", False):
            why = f"{type(strategy).__name__} needs whole weights or gradients, and each process holds a share"
            raise _refused(f"strategies.{name}", why, "use Naive, ExperienceReplay, DERpp or EWC")
    name = type(architecture).__name__
    if type(architecture).step_end is not Architecture.step_end:
        raise _refused("architecture", f"{name} reads whole weights after each step", "use one that does not")
    if any(weight.ndim == 0 for weight in architecture.parameters()):
        raise _refused("architecture", f"{name} has weights that are single numbers", "use one without")
    if training.compile:
        raise _refused("training.compile", "blocks come together between compiled parts", "set it to false")
    if training.precision == "16-mixed":
        raise _refused("training.precision", "processes would scale 16-mixed losses differently", "use bf16-mixed")
    found = resolve(training.optimizer.class_path, "optimizer", "training.optimizer")
    if found.__name__ not in OPTIMIZERS or not found.__module__.startswith("torch.optim"):
        way_out = f"use one of torch's {', '.join(OPTIMIZERS)}"
        raise _refused("training.optimizer", f"{found.__name__} may need whole matrices", way_out)


def _refused(key: str, why: str, way_out: str) -> ConfigError:
    return ConfigError(f"{key}: {why}, which training.sharding: fsdp rules out; {way_out}, or set sharding: none")


class Sharded:
    """An architecture whose weights are out of use for a time, and the twin that is trained meanwhile."""

    def __init__(self, architecture: Architecture, device: torch.device, size: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        _show_tensors_of_outputs()
        self.architecture, self.device = architecture, device
        self.twin: Architecture = copy.deepcopy(architecture)
        mesh = init_device_mesh(device.type, (size,))
        for child in self.twin.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # The root too is sharded again behind the forward pass, so that penalties find all weights alike.
        fully_shard(self.twin, mesh=mesh, reshard_after_forward=True)
        architecture.to("cpu")

    @torch.no_grad()
    def gather(self) -> None:
        """Give the architecture the twin's weights; every process takes part."""
        for mine, theirs in zip(self.architecture.parameters(), self.twin.parameters(), strict=True):
            mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        for mine, theirs in zip(self.architecture.buffers(), self.twin.buffers(), strict=True):
            mine.copy_(theirs)

    @contextmanager
    def whole(self, device: torch.device) -> Iterator[None]:
        """Within it the architecture is as the twin now is, on `device`."""
        self.architecture.to(device)
        self.gather()
        try:
            yield
        finally:
            self.architecture.to("cpu")


@contextmanager
def sharded(run: Run) -> Iterator[None]:
    """Within it the run trains the twin of its architecture, where its configuration wants that."""
    if run.config.training.sharding == "none" or run.world.size == 1:
        yield
        return
    learner, context, architecture = run.parts.learner, run.parts.context, run.parts.architecture
    run.sharded = Sharded(architecture, run.parts.device, run.world.size)
    learner.adopt(run.sharded.twin)
    context.architecture = run.sharded.twin
    with warnings.catch_warnings():
        # Logits are often a view; nothing here changes a model's answer in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield
    architecture.to(run.parts.device)
    run.sharded.gather()
    run.sharded = None
    learner.adopt(architecture)
    context.architecture = architecture


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors, as one process alone would have it; every process takes part."""
    found: dict[str, Any] = pytree.tree_map(lambda v: v.full_tensor() if isinstance(v, DTensor) else v, state)
    return found


def spread(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `gathered`: what belongs to a sharded weight is sharded like it."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def like(weight: Tensor, value: Any) -> Any:
        if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)

    parts = {n: {key: like(weights[n], value) for key, value in one.items()} for n, one in state["state"].items()}
    return {**state, "state": parts}


def _show_tensors_of_outputs() -> None:
    """FSDP learns of the backward pass from hooks on the tensors that a model answers with, and has to find them."""
    if Output in pytree.SUPPORTED_NODES:
        return
    names = ("logits", "losses", "state", "hidden", "stash")
    pytree.register_pytree_node(
        Output,
        lambda output: ([getattr(output, name) for name in names], None),
        lambda values, _: Output(**dict(zip(names, values, strict=True))),
    )
