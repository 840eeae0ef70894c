"""Avalanche's penalty and gradient plugins as strategies of our own loop.

    strategies:
      si: {class_path: AvalanchePlugin, init_args: {plugin: SynapticIntelligencePlugin, arguments: {si_lambda: 100.0}}}

Avalanche is imported when the run is set up. Its callbacks are called in its order: `before_training_exp` as a task
starts, `before_training_iteration` and `before_forward` before the forward pass, `after_forward` and `before_backward`
for the penalty, `after_backward` and `before_update` on the gradient, `after_update` and `after_training_iteration`
after the step, `after_training_exp` as the task ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from clplat.architectures.base import Output, StepOutcome
from clplat.strategies.avalanche_shim import Clock, Shim, avalanche_dataset, gradients_aside, unshared
from clplat.strategies.avalanche_state import SeededDraws, nbytes, pack, rows_of, unpack
from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.streams.avalanche_stream import named, quiet, seeded
from clplat.streams.base import Task
from clplat.streams.batch import Batch

PLUGINS = "avalanche.training.plugins"

CALLED = ("before_training", "before_training_exp", "before_training_iteration", "before_forward", "after_forward",
          "before_backward", "after_backward", "before_update", "after_update", "after_training_iteration",
          "after_training_exp", "after_training")  # fmt: skip
"""The callbacks that our loop has a place for."""

_AFTER_STEP = {"after_update", "after_training_iteration"}
_LOADER = "replaces the data loader"
_MODEL = "replaces parts of the model"
REFUSED = {
    "ReplayPlugin": (_LOADER, "ExperienceReplay"),
    "GenerativeReplayPlugin": ("trains and draws from a generator in a loop of its own", "ExperienceReplay"),
    "TrainGeneratorAfterExpPlugin": ("trains a generator in a loop of its own", ""),
    "GDumbPlugin": ("replaces the data and trains anew from its memory", ""),
    "GSS_greedyPlugin": (_LOADER, "ExperienceReplay"),
    "MIRPlugin": ("mixes its memory into Avalanche's batches", "ExperienceReplay"),
    "RARPlugin": (_LOADER, "ExperienceReplay"),
    "BiCPlugin": (_LOADER, ""),
    "CoPEPlugin": ("replaces loss and evaluation", ""),
    "CWRStarPlugin": (_MODEL, ""),
    "LFLPlugin": (_MODEL, ""),
    "FeatureDistillationPlugin": ("needs a model that returns features as Avalanche's do", ""),
    "FromScratchTrainingPlugin": ("sets the model back", ""),
    "EarlyStoppingPlugin": ("ends training by itself", "training.budget.until"),
    "LRSchedulerPlugin": ("steps the optimizer's schedule by epochs", "training.schedule"),
    **dict.fromkeys(
        (
            "CurrentDataNCMUpdate",
            "MemoryNCMUpdate",
            "NCMOracle",
            "CurrentDataFeCAMUpdate",
            "MemoryFeCAMUpdate",
            "FeCAMOracle",
        ),
        ("fills in a classifier layer of Avalanche's own", ""),
    ),
    "EvaluationPlugin": ("belongs to Avalanche's own evaluation", "the result table"),
}
"""Plugins that need Avalanche's own loop: why, and what to use here."""

_ROWS = ("memory_x", "memory_y", "memory_tid", "buffers")
"""Attributes of GEM and A-GEM that hold rows of earlier tasks."""
_TRANSIENT = ("G", "reference_gradients", "buffer_dataloader", "buffer_dliter")
"""What is made anew from the rest: reference gradients before every step, A-GEM's loader from its buffers."""


class AvalanchePlugin(Strategy):
    """One of Avalanche's penalty or gradient plugins (EWC, SI, MAS, LwF, GEM, A-GEM) in our loop."""

    paper = "Carta et al. 2023, arXiv:2302.01766 (Avalanche 0.6.0), and the plugin's own"
    fidelity: ClassVar[Fidelity] = "exact"

    def __init__(self, *, plugin: str, arguments: dict[str, Any] | None = None) -> None:
        """`plugin` names a class of `avalanche.training.plugins`, or one of your own by import path; `arguments` are
        its keyword arguments."""
        self.name, self.arguments = plugin, dict(arguments or {})
        _refuse_by_name([plugin.rpartition(".")[2]])

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.spec.kind != "classify":
            raise ValueError(f"plugin: {self.name} reads samples with one label each; on language use a strategy of "
                             "our own, for example EWC or AGEM")  # fmt: skip
        if context.world.size > 1:
            raise ValueError(f"plugin: Avalanche's {self.name} knows one process only; set training.devices to 1, "
                             "or use a strategy of our own, for example EWC or AGEM")  # fmt: skip
        found = named(self.name, PLUGINS, "plugin")
        if not isinstance(found, type):
            raise ValueError(f"plugin: {self.name} is no class")
        _refuse_by_name([parent.__name__ for parent in found.__mro__])
        try:
            with quiet():
                self.plugin: Any = found(**self.arguments)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"arguments: {self.name} does not take {self.arguments} ({error})") from error
        self.calls = self._callbacks(found)
        self.shim = Shim(context, self.name, self._criterion)
        self.draws: SeededDraws | None = None
        # GEM and A-GEM keep rows, the others none.
        self.replays = any(hasattr(self.plugin, name) for name in _ROWS)  # type: ignore[misc]
        self.owner = self._task_of_classes()
        self._inside = False
        self._gradients: list[Tensor | None] = []
        self.state_dict()  # a state that no checkpoint can keep is refused now
        samples = getattr(self.plugin, "sample_size", None)
        if samples is not None and samples < len(context.tasks):
            raise ValueError(f"arguments.sample_size: {self.name} draws at least one row of each task, give "
                             f"{len(context.tasks)} or more")  # fmt: skip

    def _callbacks(self, found: type) -> set[str]:
        """The callbacks that the plugin defines. Raises ValueError when our loop has no place for one of them."""
        from avalanche.training.plugins import SupervisedPlugin

        if not issubclass(found, SupervisedPlugin):
            raise ValueError(f"plugin: {self.name} is no plugin; it must inherit from SupervisedPlugin")
        names = [name for name in dir(found) if name.startswith(("before_", "after_"))]
        defined = {n for n in names if getattr(found, n) is not getattr(SupervisedPlugin, n, None)}
        if foreign := sorted(defined - set(CALLED)):
            raise ValueError(f"plugin: {self.name} defines {', '.join(foreign)}, which need Avalanche's own loop; "
                             "penalty and gradient plugins alone run here")  # fmt: skip
        return defined

    def _task_of_classes(self) -> Tensor:
        """The task that each output unit belongs to, for the loss of the `task` scenario (zeros in the others)."""
        owner = torch.zeros(self.context.spec.num_outputs, dtype=torch.long)
        if self.context.spec.scenario == "task":
            taken: set[int] = set()
            for task in self.context.tasks:
                if taken & set(task.classes or ()):
                    raise ValueError(
                        f"plugin: {self.name} needs tasks with classes of their own in the `task` scenario"
                    )
                taken |= set(task.classes or ())
                owner[list(task.classes or ())] = task.index
        return owner

    def _criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The run's default loss, as plugins call a criterion."""
        tasks = self.owner.to(targets.device)[targets]
        return self.context.loss(Output(logits=logits), Batch(inputs=logits, targets=targets, task=tasks))

    def _call(self, *names: str) -> None:
        for name in names:
            if name in self.calls:
                with quiet():
                    getattr(self.plugin, name)(self.shim)
                if name in ("before_training_exp", "before_training_iteration"):
                    unshared(self.plugin)

    def task_start(self, task: Task) -> None:
        clock = self.shim.clock
        clock.train_exp_iterations = clock.train_exp_epochs = clock.train_epoch_iterations = 0
        self.shim.enter(task)
        with gradients_aside(self.shim.model), seeded(self._drawn_seed()):
            self._call("before_training", "before_training_exp")

    def batch(self, batch: Batch) -> Batch:
        # Of several batches that one optimizer step accumulates, the first begins the iteration.
        if not self._inside:
            self._inside = True
            self._show(batch)
            with gradients_aside(self.shim.model):
                self._call("before_training_iteration", "before_forward")
        return batch

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        self._show(batch, output)
        if not self.calls & {"after_forward", "before_backward"}:
            return None
        before = self.context.loss(output, batch).detach()
        self.shim.loss = before.clone()
        self._call("after_forward", "before_backward")
        return self.shim.loss - before if self.shim.loss.requires_grad else None

    def gradient(self) -> None:
        self._call("after_backward", "before_update")
        if self.calls & _AFTER_STEP:
            self._gradients = [parameter.grad for parameter in self.shim.model.parameters()]

    def step_end(self, outcome: StepOutcome) -> None:
        if self.calls & _AFTER_STEP:
            with gradients_aside(self.shim.model):
                # Plugins read the gradient of the step that is done, after our loop has let go of it.
                for parameter, gradient in zip(self.shim.model.parameters(), self._gradients):
                    parameter.grad = gradient
                self._call("after_update", "after_training_iteration")
        self._gradients, self._inside = [], False
        self.shim.clock.step()

    def task_end(self, task: Task) -> None:
        self.shim.enter(task)
        seed = self._drawn_seed()
        with gradients_aside(self.shim.model), seeded(seed):
            self._call("after_training_exp", "after_training")
        if hasattr(self.plugin, "buffer_dliter"):
            # What A-GEM keeps of a task is a view of all its rows; let them go.
            self.plugin.buffers[-1] = avalanche_dataset(*rows_of(self.plugin.buffers[-1]))
            self._draw_from_buffers(seed, 0)
        self.shim.clock.train_exp_counter += 1
        self.shim.put(experience=None, mbatch=[], mb_output=None)  # the task's rows go

    def _show(self, batch: Batch, output: Output | None = None) -> None:
        if self.context.task is not None:
            self.shim.enter(self.context.task)
        self.shim.show(batch, output)

    def _drawn_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.context.generator))

    def _draw_from_buffers(self, seed: int, drawn: int) -> None:
        """Give A-GEM a loader whose draws follow from a seed and a count, so that they can be taken up again."""
        from avalanche.benchmarks.utils.data_loader import GroupBalancedInfiniteDataLoader

        plugin = self.plugin
        plugin.buffer_dataloader = GroupBalancedInfiniteDataLoader(
            plugin.buffers, batch_size=plugin.sample_size // len(plugin.buffers), num_workers=0, pin_memory=False,
            persistent_workers=False,
        )  # fmt: skip
        plugin.buffer_dliter = self.draws = SeededDraws(plugin.buffer_dataloader, seed)
        for _ in range(drawn):
            next(self.draws)

    def _rows(self) -> dict[str, Any]:
        kept = vars(self.plugin)
        return {name: pack(kept[name], f"plugin: {self.name}.{name}") for name in _ROWS if name in kept}

    def stored_bytes(self) -> int:
        return nbytes(self._rows()) if self.replays else 0

    def state_dict(self) -> dict[str, Any]:
        kept = {n: value for n, value in sorted(vars(self.plugin).items()) if n not in (*_ROWS, *_TRANSIENT)}
        return {
            "clock": dataclasses.asdict(self.shim.clock),
            "plugin": {name: pack(value, f"plugin: {self.name}.{name}") for name, value in kept.items()},
            "rows": self._rows(),
            "draws": None if self.draws is None else [self.draws.seed, self.draws.drawn],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shim.put(clock=Clock(**state["clock"]))
        for name, packed in (state["plugin"] | state["rows"]).items():
            setattr(self.plugin, name, unpack(packed, self.shim, getattr(self.plugin, name, None)))
        if state["draws"] is not None:
            self._draw_from_buffers(*state["draws"])


def _refuse_by_name(names: list[str]) -> None:
    for name in names:
        if name in REFUSED:
            why, instead = REFUSED[name]
            remedy = f"; use {instead}" if instead else "; penalty and gradient plugins alone run here"
            raise ValueError(f"plugin: {name} {why}, which our loop owns{remedy}")
