"""From a configuration to the living parts of a run: stream, architecture, strategies, learner, evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from clplat.architectures.base import Architecture, SideMemories, as_in_task, device_of
from clplat.compilation import replayed
from clplat.components import build
from clplat.config import Precision, RunConfig
from clplat.errors import ConfigError
from clplat.evaluation import Evaluator
from clplat.hooks import Hooks
from clplat.learner import Learner
from clplat.objective import Objective
from clplat.observing import check_probes
from clplat.precision import keep_weights, read_rows
from clplat.randomness import generator, seed_global
from clplat.reading import check_learning
from clplat.sharding import check_sharding
from clplat.strategies.base import Context
from clplat.strategies.world import World
from clplat.streams.base import Data, Stream
from clplat.streams.batch import Batch


@dataclass(kw_only=True)
class Parts:
    """Everything that a run works with, built and checked, on its device."""

    stream: Stream
    architecture: Architecture
    hooks: Hooks
    learner: Learner
    evaluator: Evaluator
    context: Context
    world: World
    device: torch.device


def assemble(config: RunConfig, world: World, stream: Stream | None = None) -> Parts:
    """Build all parts, around `stream` where one is prepared already.

    Whatever is wrong with the configuration is said here, before any training.
    """
    stream = stream or prepared_stream(config)
    architecture = built_architecture(config, stream)
    hooks = Hooks({n: build(c, "strategy", f"strategies.{n}") for n, c in config.strategies.items()})
    device = device_for(config.training.accelerator)
    objective = Objective(stream.spec, stream.tasks).to(device)
    architecture.to(device)
    context = _context(config, stream, architecture, objective, world, optimizer=lambda: learner.optimizer())
    _refuse_growth(config, hooks, architecture, stream)
    check_sharding(config.training, hooks, architecture)
    hooks.setup(context)
    _refuse_unbegun_memories(hooks, architecture)
    check_probes(hooks.controllers, stream.tasks)
    check_learning(architecture, hooks, stream.tasks)
    if config.training.accumulate > 1 and hooks.step_owner is not None:
        raise ConfigError("training.accumulate: a strategy of this run owns the step, which rules out accumulation")
    fresh = [name for name, strategy in hooks.strategies.items() if strategy.restarts]
    if fresh and config.training.optimizer_state == "keep":
        raise ConfigError(f"training.optimizer_state: strategies.{fresh[0]} begins every task from the initial "
                          "weights, where momenta of the last task mean nothing; use reset")  # fmt: skip
    mode = config.training.compile
    if replayed(mode) and max(config.training.accumulate, config.training.devices) > 1:
        raise ConfigError(f"training.compile: {mode} needs accumulate 1 and devices 1; use true instead")
    if mode == "cudagraphs" and hooks.step_owner is not None:
        owner = next(name for name, strategy in hooks.strategies.items() if strategy is hooks.step_owner)
        raise ConfigError(f"training.compile: cudagraphs records the learner's own step, and strategies.{owner} owns "
                          "the step; use false or true, or leave the strategy out")  # fmt: skip
    evaluator = Evaluator(
        architecture=architecture, objective=objective, hooks=hooks, tasks=stream.tasks, probes=stream.probes,
        world=world, batch_size=config.evaluation.batch_size, max_rows=config.evaluation.max_rows,
        precision=config.training.precision,
    )  # fmt: skip
    learner = Learner(architecture, objective, hooks, config.training, augment=stream.augment, world=world)
    return Parts(
        stream=stream, architecture=architecture, hooks=hooks, learner=learner, evaluator=evaluator,
        context=context, world=world, device=device,
    )  # fmt: skip


def _refuse_growth(config: RunConfig, hooks: Hooks, architecture: Architecture, stream: Stream) -> None:
    """Refuse a model that grows from the first task to the second where something needs it to keep its shape."""
    needs = {f"strategies.{name}": strategy.fixed for name, strategy in hooks.strategies.items()}
    if config.training.optimizer_state == "keep":
        needs["training.optimizer_state"] = "trained"
    if set(needs.values()) <= {"nothing"}:
        return
    first, second = (as_in_task(architecture, stream.tasks[:number]) for number in (1, 2))
    grown = {
        "trained": _trained_shapes(first) != _trained_shapes(second),
        "everything": _shapes(architecture) != _shapes(second),
    }
    for key, fixed in needs.items():
        if grown.get(fixed):
            way_out = "use reset" if key == "training.optimizer_state" else "leave the strategy out"
            raise ConfigError(
                f"{key}: needs a model that keeps its shape, and {type(architecture).__name__} grows from task to "
                f"task; use one that does not grow, or {way_out}"
            )


def _refuse_unbegun_memories(hooks: Hooks, architecture: Architecture) -> None:
    """Refuse side memories that would be trained as random slots, whatever their options say."""
    begun = any(strategy.begins_memories or not strategy.trains for strategy in hooks.strategies.values())
    if isinstance(architecture, SideMemories) and architecture.needs_beginning and not begun:
        raise ConfigError(
            f"strategies: none of them begins the memories of {type(architecture).__name__}, and its memory.start "
            "would do nothing; add Locas, or set memory.start: gaussian"
        )


def _trained_shapes(architecture: Architecture) -> list[torch.Size]:
    return [p.shape for p in architecture.parameters() if p.requires_grad]


def _shapes(architecture: Architecture) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in architecture.state_dict().items()}


def prepared_stream(config: RunConfig) -> Stream:
    """The stream with its data read, cut to its first tasks where asked for, every task checked not to be empty."""
    stream: Stream = build(config.stream, "stream", "stream", {"seed": config.seed})
    try:
        stream.prepare()
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"stream: {error}") from error
    if not stream.tasks:
        raise ConfigError(f"stream: {type(stream).__name__} has no tasks")
    if config.tasks is not None:
        if config.tasks > len(stream.tasks):
            raise ConfigError(f"tasks: the first {config.tasks} were asked for, and the stream has {len(stream.tasks)}")
        stream.tasks = stream.tasks[: config.tasks]
    for task in stream.tasks:
        for name, data in (("training", task.train), ("test", task.test.data)):
            if len(data) == 0:
                raise ConfigError(f"stream: task {task.name!r} has no {name} rows; leave it out or give it data")
    return stream


def built_architecture(config: RunConfig, stream: Stream) -> Architecture:
    """The architecture with the initial weights of this seed, the same for every variant."""
    seed_global(config.seed, "init")
    architecture: Architecture = build(config.architecture, "architecture", "architecture", {"spec": stream.spec})
    if stream.spec.heads is not None and not architecture.several_heads:
        raise ConfigError(
            f"architecture: {type(architecture).__name__} answers one question about a sample, and this stream asks "
            f"{stream.spec.heads}; choose one that declares `several_heads`, for example LeakyRNN, or a stream with one"
        )
    if stream.spec.kind == "language" and architecture.causal is not True:
        raise ConfigError(
            f"architecture: {type(architecture).__name__} is not causal, and a language stream would let it read the "
            "tokens that it has to predict; choose a causal architecture, for example Transformer"
        )
    keep_weights(architecture, config.training.precision)
    read_rows(architecture, config.training.precision)
    return architecture


def device_for(accelerator: str) -> torch.device:
    """This process's device."""
    import os

    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("training.accelerator: 'gpu' was asked for, and torch sees none; use 'auto' or 'cpu'")
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _context(
    config: RunConfig,
    stream: Stream,
    architecture: Architecture,
    objective: Objective,
    world: World,
    optimizer: Callable[[], torch.optim.Optimizer],
) -> Context:
    def batches(data: Data, batch_size: int) -> Iterator[Batch]:
        for rows in torch.arange(len(data)).split(batch_size):
            yield data.batch(rows).to(device_of(context.architecture))

    context = Context(
        architecture=architecture,
        spec=stream.spec,
        tasks=stream.tasks,
        world=world,
        generator=generator(config.seed, "strategy"),
        loss=objective,
        row_loss=objective.row_loss,
        masked=objective.masked,
        batches=batches,
        batch_size=config.training.batch_size,
        device=lambda: device_of(context.architecture),
        optimizer=optimizer,
    )
    return context


def load_weights(architecture: Architecture, state: dict[str, Any], precision: Precision) -> None:
    """Grow the architecture to its saved structure, then load its saved weights."""
    architecture.restructure(state["structure"])
    keep_weights(architecture, precision)
    architecture.load_state_dict(state["architecture"])
