"""Few-shot continual learning with a pair of weight sets: fast ones that do not forget, slow ones that generalise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.distillation import LwF
from clplat.strategies.exemplars import remember_exemplars
from clplat.strategies.fisher import fisher_diagonal, mean_loss, try_gradients_by_row
from clplat.strategies.nearest_mean import NearestMean
from clplat.strategies.quadratic import QuadraticPenalty
from clplat.strategies.replay import ExperienceReplay, rows_of_all_classes
from clplat.strategies.slow_weights import SlowWeights
from clplat.strategies.weights import flat_parameters, move_weights
from clplat.streams.base import Task
from clplat.streams.batch import Batch
from clplat.streams.episodes import EpisodeShape


class FastSlow(QuadraticPenalty, ExperienceReplay):
    """Fast and slow weights with two-step consolidation: our reconstruction of TSC, whose equations are not public.

    Step 1: the model's own, fast weights f are trained on the task and the memory M under λ/2 Σ O_i (f_i − f*_i)² and
    distillation from f*, the fast weights after the last task. Step 2, at the task's end: slow weights S learn from
    episodes of M ∪ D_t, S ← S − η m ⊙ ∇L_proto, then S ← S + r m ⊙ (f − S); fast ones follow, f ← f + q (S − f). The
    meta-plasticity m_i = 1 / (1 + a O_i / mean O) makes important weights rigid; O ← g O + Fisher(f, D_t). The first
    task trains both together: S is a copy of what it left. Equations and what is ours: docs/fast_slow.md.
    """

    knobs = ("ratio", "strength", "distillation", "to_slow", "to_fast")
    own_weights = "fast"
    paper = "Wang et al. 2021, arXiv:2104.09034"
    fidelity = "interpretation"
    factor = 0.5
    slow: SlowWeights | None

    def __init__(
        self,
        *,
        memory_per_class: int = 5,
        ratio: float = 1.0,
        strength: float = 1.0,
        distillation: float = 1.0,
        temperature: float = 2.0,
        plasticity: float = 1.0,
        episodes: int = 100,
        slow_rate: float = 0.01,
        episode: EpisodeShape | None = None,
        to_slow: float = 0.05,
        to_fast: float = 0.25,
        decay: float = 1.0,
        single: bool = False,
        answers: Literal["prototypes", "head"] = "prototypes",
        fisher_samples: int | None = 256,
        fisher_batch_size: int = 16,
    ) -> None:
        """`memory_per_class` rows k, chosen by herding; `ratio` of them replayed for each current row, in one mean.
        `strength` is λ, `distillation` its weight μ at `temperature` T, `plasticity` a (0: all weights equally
        plastic), `to_slow` r, `to_fast` q, `decay` g. Step 2 has `episodes` (0: none) at the rate `slow_rate` η, of
        the shape `episode` (default: 10 ways, 1 shot, 4 queries). With `single` there is one set of weights: step 2
        goes on with the fast ones, and r and q mean nothing. `answers` come from the nearest mean of the memory, or
        from the model's own head, through either set. `fisher_samples` and `fisher_batch_size` as in `EWC`."""
        self.episode = episode or EpisodeShape(ways=10, shots=1, queries=4)
        if memory_per_class < self.episode.rows:
            raise ValueError(f"memory_per_class: {memory_per_class} rows a class do not hold an episode's "
                             f"{self.episode.rows}; raise it, or lower episode.queries")  # fmt: skip
        super().__init__(capacity=memory_per_class, policy="class_balanced", ratio=ratio, mean="all", fill="task_end")
        _check_shares(to_slow=to_slow, to_fast=to_fast, decay=decay)
        _check_not_negative(strength=strength, plasticity=plasticity, slow_rate=slow_rate, episodes=episodes)
        if answers not in ("prototypes", "head"):
            raise ValueError(f"answers: must be prototypes or head, got {answers!r}")
        self.per_class, self.strength, self.plasticity, self.slow = memory_per_class, strength, plasticity, None
        self.distillation, self.distiller = distillation, LwF(alpha=distillation, temperature=temperature)
        self.episodes, self.slow_rate = episodes, slow_rate
        self.to_slow, self.to_fast, self.decay, self.single, self.answers = to_slow, to_fast, decay, single, answers
        self.fisher_samples, self.fisher_batch_size = fisher_samples, fisher_batch_size

    def setup(self, context: Context) -> None:
        self.capacity = rows_of_all_classes(context, self.per_class, option="FastSlow.memory_per_class")
        super().setup(context)
        self.nearest = NearestMean(context, self.buffer, "FastSlow")
        self.distiller.setup(context)
        if self.measures_importance and self.fisher_batch_size > 1:
            try_gradients_by_row(context, mean_loss, torch.square, option="FastSlow.fisher_batch_size")

    @property
    def measures_importance(self) -> bool:
        """Whether anything depends on O."""
        return bool(self.strength or self.plasticity)

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        self.distiller.alpha = self.distillation
        # Without origins: the distillation is of all rows, those of the memory too.
        answered = self.distiller.penalty(output, batch.replaced(origin=None))
        held = super().penalty(output, batch)
        return answered if held is None else held if answered is None else held + answered

    def task_end(self, task: Task) -> None:
        fast = self.context.architecture
        if self.slow is None:
            self.slow = SlowWeights(fast)
        else:
            self.consolidate(task, self.slow)
        if self.measures_importance:
            new = fisher_diagonal(
                self.context, task, samples=self.fisher_samples, labels="sampled",
                batch_size=self.fisher_batch_size, per_sample=True,
            )  # fmt: skip
            self.importance = new if self.importance is None else self.decay * self.importance + new
            self.anchor = self.weights().detach()
        self.distiller.alpha = self.distillation
        self.distiller.task_end(task)
        remember_exemplars(self.context, self.buffer, task, self.per_class)

    def consolidate(self, task: Task, slow: SlowWeights) -> None:
        """Step 2, and what passes between the two sets."""
        fast, plastic = self.context.architecture, self.meta_plasticity()
        if self.single:
            slow.copy_from(fast)
        # A source of their own, so that more or fewer episodes leave later draws of the memory as they were.
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=self.context.generator)))
        slow.learn(
            self.rows(task), plastic, rate=self.slow_rate, episodes=self.episodes, shape=self.episode, generator=draw
        )
        if self.single:
            fast.load_state_dict(slow.model.state_dict())
            return
        slow.approach(fast, self.to_slow * plastic)
        move_weights(fast, flat_parameters(slow.model), self.to_fast)

    def meta_plasticity(self) -> Tensor:
        """m_i = 1 / (1 + a O_i / mean O) in (0, 1], (P,)."""
        importance = self.importance if self.importance is not None else torch.zeros_like(self.weights().detach())
        mean = importance.mean().clamp(min=torch.finfo(importance.dtype).tiny)
        return 1 / (1 + self.plasticity * importance / mean)

    def rows(self, task: Task) -> Batch:
        """M ∪ D_t, where no row is twice: the task's own come into the memory after this."""
        parts = [*self.context.batches(task.train, 256), *([self.buffer.batch()] if len(self.buffer) else [])]
        return reduce(Batch.joined, parts)

    def prepare_predict(self) -> None:
        if self.answers == "prototypes":
            self.nearest.prepare()

    def predict(self, batch: Batch) -> Tensor:
        if self.answers == "prototypes":
            return self.nearest.logits(batch)
        logits = self.context.architecture(batch).logits
        return self.context.masked(Output(logits=self.nearest.among_seen(logits, batch)), batch)

    def views(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        """`slow`; by default the fast weights answer. Until the first task has ended there is one set alone."""
        slow = nullcontext if self.slow is None else partial(self.slow.standing_in_for, self.context.architecture)
        return {"slow": slow}

    def state_dict(self) -> dict[str, Any]:
        slow = None if self.slow is None else self.slow.state_dict()
        return {
            "buffer": self.buffer.state_dict(), "importance": QuadraticPenalty.state_dict(self),
            "distiller": self.distiller.state_dict(), "slow": slow,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ExperienceReplay.load_state_dict(self, state)
        QuadraticPenalty.load_state_dict(self, state["importance"])
        self.distiller.load_state_dict(state["distiller"])
        if state["slow"] is not None:
            self.slow = SlowWeights(self.context.architecture)
            self.slow.load_state_dict(state["slow"])


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: must lie between 0 and 1, got {share}")


def _check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name}: must not be negative, got {number}")
