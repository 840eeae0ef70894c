"""The learner: architecture, objective and strategies as the one LightningModule, and nothing else.

`training_step` is the way of a batch: mix in replay, one forward, the loss as a sum of named terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clplat.architectures.base import Architecture, Output, State, StepOutcome
from clplat.compilation import answerer, compiled, replayed
from clplat.config import TrainingConfig
from clplat.errors import ConfigError, NotFiniteError
from clplat.hooks import Hooks
from clplat.lightning_parts import LightningModule
from clplat.loss_means import LossMeans
from clplat.objective import Objective
from clplat.optimization import configured_optimizer, warn_of_still_levels
from clplat.recording import Recorded
from clplat.schedule import rate_factor
from clplat.sharding import gathered, spread
from clplat.strategies.world import World
from clplat.streams.batch import CURRENT, REPLAY, Batch


class Watch(Protocol):
    """Whoever follows the steps of a task."""

    def begun(self) -> None: ...

    def step_done(self) -> None: ...

    def ended(self) -> None: ...


class Learner(LightningModule):
    """Trains one architecture under the strategies of a run; the run loop owns everything between tasks.

    `augment` is the stream's. `watch` is told when the first step of a task can begin, when an optimizer step is done,
    and when the task's last one is.
    """

    def __init__(
        self,
        architecture: Architecture,
        objective: Objective,
        hooks: Hooks,
        training: TrainingConfig,
        augment: Callable[[Tensor], Tensor] | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.hooks, self.training_config = objective, hooks, training
        self.world = world or World()
        self._plain_augment = augment
        self.augment = compiled(augment, training.compile) if augment is not None else None
        # The step is written out in `_step`: Lightning's automatic one costs more than a small model's forward.
        self.automatic_optimization = False
        self.adopt(architecture)
        self.full_rows = training.batch_size
        self.carried: State = None
        self.window: dict[str, list[Tensor]] = {}
        self.rows = {"current": 0, "replay": 0}
        self.total_steps = 1
        self.batches = 0
        self.global_steps = 0
        self.observed: list[Tensor] | None = [] if any(c.observe_every for c in hooks.controllers.values()) else None
        self.optimizer_state: dict[str, Any] | None = None
        self.scaler_state: Mapping[str, Any] | None = None
        self._fitting = False
        self._current_optimizer: list[Any] = []
        self._weights: list[Tensor] = []
        self._finished: list[tuple[Batch, Output]] = []
        self.watch: Watch | None = None

    def adopt(self, architecture: Architecture) -> None:
        """Train this architecture from now on."""
        self.architecture, hooks, augment = architecture, self.hooks, self.augment
        plain = answerer(
            architecture, self.objective if hooks.objective is None else None, self._plain_augment,
            with_inputs=augment is not None and bool(hooks.with_penalty or hooks.objective),
            open_logits=bool(hooks.with_penalty), hidden=hooks.hidden,
        )  # fmt: skip
        # A ResNet compiled for rows of any number takes 1.6 times as long as one for a single size; controllers change
        # the rows of replay too often for that. In a tuple, so that no second module is registered.
        dynamic = None if hooks.controllers else False
        mode = self.training_config.compile
        recorded = Recorded(plain, architecture) if mode == "cudagraphs" else None
        self._answers = (plain, recorded or compiled(plain, mode, dynamic=dynamic))

    def __setattr__(self, name: str, value: Any) -> None:
        """Plain values take the short way past torch's bookkeeping; Lightning sets one at every hook."""
        if isinstance(value, str | int) or value is None:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch: mix in replay, forward, and the loss as a sum of named terms; then the optimizer's part."""
        rows = len(batch)
        if self.hooks.with_batch:
            batch = self.hooks.batch(batch)
        self.rows["current"] += rows
        self.rows["replay"] += len(batch) - rows
        if self.hooks.step_owner is not None:
            seen = batch if self.augment is None else batch.replaced(inputs=self.augment(batch.inputs))
            loss, output = self.hooks.step_owner.step(seen, self.optimizer())
            self._note({"loss": loss})
        else:
            # The shorter batch that ends a pass is not worth a compilation.
            answer = self._answers[rows == self.full_rows]
            inputs, output, parts = answer(batch, self.carried)
            seen = batch if inputs is None else batch.replaced(inputs=inputs)
            self._step(self._loss(output, seen, parts))
            if self.hooks.hidden is not None:
                output.hidden = None  # of every layer perhaps: not to be kept until the micro-batches are joined
        if self.architecture.memory_life != "sequence":
            self.carried = pytree.tree_map(lambda value: self.world.mean(self._kept(value)), output.state)
        # What delayed writes may keep: the rows as they are, not this use's augmentation of them.
        self._finished.append((batch, output))

    def _loss(self, output: Output, batch: Batch, parts: Tensor | None) -> Tensor:
        """Objective + auxiliary losses + penalties, each logged under its name."""
        terms = {"loss": self._objective(output, batch, parts)}
        if output.losses:
            terms |= {f"loss_{name}": value for name, value in output.losses.items()}
        if self.hooks.with_penalty:
            terms |= {f"penalty_{name}": value for name, value in self.hooks.penalties(output, batch).items()}
        self._note(terms)
        return torch.stack(list(terms.values())).sum() if len(terms) > 1 else terms["loss"]

    def _step(self, loss: Tensor) -> None:
        """Backward, and after `accumulate` batches: strategies change the gradient, clip, step."""
        config, optimizer = self.training_config, self.optimizer()
        if config.accumulate > 1:
            loss = loss / config.accumulate
        # Through Lightning, which scales 16-bit losses and has processes exchange gradients.
        self.manual_backward(loss)
        if (self.batches + 1) % config.accumulate:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        for strategy in self.hooks.with_gradient:
            strategy.gradient()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._weights, config.clip_norm)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    def _objective(self, output: Output, batch: Batch, parts: Tensor | None) -> Tensor:
        """The loss without auxiliary losses and penalties; of a mixed batch its two parts are logged too."""
        if parts is None:
            assert self.hooks.objective is not None
            return self.hooks.objective.objective(output, batch)
        if parts.ndim == 0:
            return parts
        self._note({"loss_current": parts[CURRENT], "loss_replay": parts[REPLAY]})
        return parts.sum()

    def _note(self, terms: Mapping[str, Tensor]) -> None:
        """Keep loss terms on the device until somebody logs them: no synchronisation in a step."""
        for name, value in terms.items():
            self.window.setdefault(name, []).append(self._kept(value))
        if self.observed is not None and "loss" in terms:
            self.observed.append(self.window["loss"][-1])

    def _kept(self, value: Tensor) -> Tensor:
        """What outlives the step."""
        return value.detach().clone() if replayed(self.training_config.compile) else value.detach()

    def on_train_start(self) -> None:
        """Continue with the optimizer of the interrupted, or of the last, task where there is one."""
        self._fitting = True
        self._current_optimizer = [self.optimizers(use_pl_optimizer=False)]
        self._weights = list(self.architecture.parameters())
        if self.optimizer_state is not None:
            try:
                self.optimizer().load_state_dict(spread(self.optimizer_state, self.optimizer()))
            except ValueError as error:
                raise ConfigError(
                    f"training.optimizer_state: keep needs the same parameters in every task, and "
                    f"{type(self.architecture).__name__} went on with others; use reset ({error})"
                ) from error
        if self.scaler_state:
            self.trainer.precision_plugin.load_state_dict(dict(self.scaler_state))
        if self.watch is not None:
            self.watch.begun()

    def batch_start(self) -> None:
        """The learning rate as a pure function of the step, so that resuming needs no scheduler state."""
        config = self.training_config
        if config.schedule == "constant" and not config.warmup:
            return
        step = self.global_steps if config.schedule_span == "stream" else self.batches // config.accumulate
        factor = rate_factor(step, self.total_steps, config.schedule, config.warmup)
        for group in self.optimizer().param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor

    def batch_done(self) -> None:
        """Count what is finished; after an optimizer step, tell architecture, strategies and the run loop."""
        self.batches += 1
        if self.batches % self.training_config.accumulate:
            return
        self.global_steps += 1
        self._tell_step_end()
        if self.watch is not None:
            self.watch.step_done()

    def _tell_step_end(self) -> None:
        if self.hooks.with_step_end or type(self.architecture).step_end is not Architecture.step_end:
            batch, output = self._finished[0]
            if len(self._finished) > 1:
                batch = reduce(Batch.joined, (part for part, _ in self._finished))
                parts = [part for _, part in self._finished]
                output = Output(
                    logits=torch.cat([part.logits.detach() for part in parts]),
                    stash={name: torch.cat([part.stash[name] for part in parts]) for name in output.stash},
                )
            outcome = StepOutcome(
                step=self.global_steps,
                batch=batch,
                output=output,
                row_loss=lambda: self.objective.row_loss(output, batch).detach(),
            )
            self.architecture.step_end(outcome)
            self.hooks.step_end(outcome)
        self._finished.clear()

    def on_train_end(self) -> None:
        """The optimizer's last state of the task, for a next task that keeps it."""
        self.optimizer_state, self._fitting = gathered(self.optimizer().state_dict()), False
        if isinstance(self._answers[1], Recorded):
            self._answers[1].forget()
        if self.watch is not None:
            self.watch.ended()

    def all_trained(self) -> None:
        """Say what no step has reached; nothing is known of the optimizer where the last task was trained before."""
        for optimizer in self._current_optimizer:
            warn_of_still_levels(optimizer, self.global_steps)

    def task_done(self) -> None:
        """Forget what does not live on into the next task."""
        self.scaler_state = None
        if self.training_config.optimizer_state == "reset":
            self.optimizer_state = None
        if self.architecture.memory_life != "run":
            self.carried = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return configured_optimizer(self.training_config, self.architecture)

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the task that is being trained."""
        return self._current_optimizer[0]

    def live_optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's state now, or the one kept for the next task."""
        return gathered(self.optimizer().state_dict()) if self._fitting else self.optimizer_state

    def live_scaler_state(self) -> dict[str, Any]:
        """State of the loss scaler of 16-bit training; empty otherwise."""
        return dict(self.trainer.precision_plugin.state_dict()) if self._fitting else {}

    def current_rate(self) -> float | None:
        """The learning rate of the first parameter group; None outside training."""
        return float(self.optimizer().param_groups[0]["lr"]) if self._fitting else None

    def flush(self, world: World) -> LossMeans | None:
        """Means of the loss terms since the last flush, on their way to the host; None without any."""
        means = {name: torch.stack(values).float().mean() for name, values in self.window.items() if values}
        self.window.clear()
        if not means:
            return None
        return LossMeans(list(means), world.sum(torch.stack(list(means.values()))) / world.size, self.global_steps)

    def take_observed(self, world: World) -> float | None:
        """Mean loss since the last time a controller was told."""
        if not self.observed:
            return None
        mean = world.sum(torch.stack(self.observed).float().mean()) / world.size
        self.observed = []
        return float(mean)

    def check_weights(self, architecture: Architecture) -> None:
        """Refuse to go on, and so to save, when a weight is not a number."""
        sums = torch.stack([p.detach().float().sum() for p in architecture.parameters()])
        if not bool(torch.isfinite(sums).all()):
            penalties, cause = [name for name, _ in self.hooks.with_penalty], architecture.not_finite()
            raise NotFiniteError(f"a weight became infinite or NaN by step {self.global_steps}", penalties, cause)
