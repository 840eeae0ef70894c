"""I-LoRA: a fast adapter that is trained, and a slow one that follows it and that replayed rows are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor

from clplat.architectures.base import Adapters, Output, StepOutcome
from clplat.strategies.adapters import copied_adapter, first_adapter
from clplat.strategies.base import Context, Fidelity, Hidden
from clplat.strategies.consistency import Positions, Target, consistency_loss, counted_tokens, row_means
from clplat.strategies.ilora_arms import ARMS, Answers, Arm, Boundary, Layers, Options, Space
from clplat.strategies.paired_weights import SlowFast
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.weights import evaluating
from clplat.streams.base import Task
from clplat.streams.batch import Batch

SLOW = "slow"
"""The adapter that holds slow weights."""
VIEWS = ("fast", "slow", "interpolated")


class ILoRA(ExperienceReplay):
    """Interpolation-based LoRA: L = CE(w; D ∪ M) + γ · distance(w, l on M), then l ← λ l + (1 − λ) w.

    w is the trained adapter, l a second one, which takes no gradient; M is replayed. Both answer in evaluations, and so
    does what lies between them: the views are `fast`, `slow` and `interpolated`, of which the one in `answer_with` is
    the default view. Beside `ExperienceReplay(mean="all")` with the same options γ alone makes a difference to w.
    """

    knobs = ("ratio", "weight", "consistency")
    fixed = "trained"
    own_weights = "fast"
    paper = "Ren et al. 2024, arXiv:2402.18865"
    fidelity: ClassVar[Fidelity] = "mechanism"

    def __init__(
        self,
        *,
        arm: Arm = "paper",
        capacity: int | None = 500,
        capacity_bytes: int | None = None,
        ratio: float = 1.0,
        weight: float = 1.0,
        from_task: int = 2,
        exclude_current: bool = False,
        consistency: float = 1.0,
        decay: float | None = None,
        target: Target | None = None,
        space: Space | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        boundary: Boundary | None = None,
        answer_with: Answers | None = None,
        slow_share: float = 0.5,
    ) -> None:
        """`arm` names a set of options, each of which may be given beside it (`ilora_arms.Options` explains them):
        `paper`, the equations; `code_intent`, the authors' program with its moving average mended; `code_inert_ema`,
        as it runs. `capacity` rows in a reservoir (or `capacity_bytes`, with `capacity: null`), of which `ratio` for
        each current one are replayed from task number `from_task` on, with `exclude_current` none of the current
        task's; one mean is taken over all rows, with `weight` for replayed ones. `consistency` is γ, 1 as in the
        program. `slow_share` of the slow weights is in the view `interpolated`."""
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy="reservoir", ratio=ratio, weight=weight,
            from_task=from_task, mean="all", draw_from="past" if exclude_current else "all",
        )  # fmt: skip
        if arm not in ARMS:
            raise ValueError(f"arm: must be one of {', '.join(ARMS)}, got {arm!r}")
        given: dict[str, Any] = {
            "decay": decay, "target": target, "space": space, "layers": layers, "positions": positions,
            "boundary": boundary, "answer_with": answer_with,
        }  # fmt: skip
        self.options = replace(ARMS[arm], **{name: value for name, value in given.items() if value is not None})
        _check(self.options)
        if consistency < 0:
            raise ValueError(f"consistency: must not be negative, got {consistency}")
        if not 0 <= slow_share <= 1:
            raise ValueError(f"slow_share: must lie between 0 and 1, got {slow_share}")
        self.consistency, self.slow_share, self.replayed = consistency, slow_share, slice(0, 0)
        self.hidden = self._needed()

    def setup(self, context: Context) -> None:
        if context.spec.kind != "language":
            raise ValueError("ILoRA: reads token rows, and the stream has none; use a language stream")
        # Before rows are counted: what is wrong with the model is the more telling.
        self.fast = first_adapter(context, "ILoRA")
        super().setup(context)
        self.model = cast(Adapters, context.architecture)
        copied_adapter(context, SLOW, self.fast)
        self.pairs = SlowFast(self.model.adapter_parameters(self.fast), self.model.adapter_parameters(SLOW))
        if self.hidden is not None:
            self._check_hidden()
        elif self.options.positions != "targets" and getattr(context.architecture, "logits_at", "all") == "targets":
            raise ValueError(f"ILoRA.positions: {self.options.positions} of space: logits needs logits of all tokens; "
                             "give positions: targets, or the model logits: all")  # fmt: skip

    def task_start(self, task: Task) -> None:
        if not self.context.past or self.options.boundary == "reset_slow":
            self.pairs.slow_from_fast()
        elif self.options.boundary == "reset_fast":
            self.pairs.fast_from_slow()
        self.pairs.mark()

    def batch(self, batch: Batch) -> Batch:
        mixed = super().batch(batch)
        self.replayed = slice(len(batch), len(mixed))
        return mixed

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        if self.replayed.start == self.replayed.stop or not self.consistency:
            return None
        rows = batch.rows(self.replayed)
        slow, better = self.slow_answer(rows), None
        if self.options.target == "better_ce":
            fast = Output(logits=output.logits[self.replayed].detach())
            costs = [row_means(self.context.row_loss(answer, rows), rows.targets) for answer in (slow, fast)]
            better = costs[0] < costs[1]
        return self.consistency * consistency_loss(
            self._compared(output)[self.replayed], self._compared(slow), better=better, target=self.options.target,
            counted=counted_tokens(rows.targets, self.options.positions),
        )  # fmt: skip

    @torch.no_grad()
    def slow_answer(self, rows: Batch) -> Output:
        """What slow weights answer to `rows`, in evaluation mode: no dropout in what others are held to."""
        architecture = self.context.architecture
        with self.model.answering(SLOW), evaluating(architecture):
            return architecture(rows, None, self.hidden) if self.hidden else architecture(rows)

    def step_end(self, outcome: StepOutcome) -> None:
        """Once an optimizer step, however many batches it had."""
        super().step_end(outcome)
        self.pairs.update(self.options.decay)

    def task_end(self, task: Task) -> None:
        super().task_end(task)
        if self.options.decay < 1:
            self.pairs.check_moved()

    def views(self) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
        answers: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "fast": partial(self.model.answering, self.fast),
            "slow": partial(self.model.answering, SLOW),
            "interpolated": partial(self.pairs.interpolated, self.slow_share),
        }
        return {"default" if name == self.options.answer_with else name: answers[name] for name in VIEWS}

    def signals(self) -> dict[str, float]:
        """Beside those of replay, how far slow weights are from fast ones, ‖l − w‖."""
        return super().signals() | {"slow_distance": float(self.pairs.distance())}

    def _needed(self) -> Hidden | None:
        if self.options.space == "logits":
            return None
        return "last" if self.options.layers == "last" else "all"

    def _compared(self, output: Output) -> Tensor:
        """What of an answer is held to the slow one: (B, T, C), or (B, S, T, C) for S layers."""
        if self.options.space == "logits":
            return output.logits
        assert output.hidden is not None, "checked at setup"
        if isinstance(self.options.layers, list):
            return torch.stack([output.hidden[:, layer] for layer in self.options.layers], dim=1)
        return output.hidden

    @torch.no_grad()
    def _check_hidden(self) -> None:
        """Refuse a model that does not show the layers asked for, before training: tried on one row."""
        row = self.context.tasks[0].train.batch(torch.tensor([0])).to(self.context.device())
        hidden, layers, name = (
            self.slow_answer(row).hidden,
            self.options.layers,
            type(self.context.architecture).__name__,
        )
        if hidden is None or hidden.ndim != (3 if layers == "last" else 4):
            raise ValueError(f"ILoRA.layers: {name} does not show hidden states of {layers!r} layers; use "
                             f"{'' if layers == 'last' else 'last, or '}space: logits")  # fmt: skip
        if isinstance(layers, list) and not all(-hidden.shape[1] <= layer < hidden.shape[1] for layer in layers):
            raise ValueError(f"ILoRA.layers: {layers} are not all there; {name} has {hidden.shape[1]}, of which 0 are "
                             "the embeddings")  # fmt: skip


def _check(options: Options) -> None:
    if not 0 <= options.decay <= 1:
        raise ValueError(f"decay: must lie between 0 and 1, got {options.decay}")
    if options.layers == [] or (isinstance(options.layers, str) and options.layers not in ("all", "last")):
        raise ValueError(f"layers: must be all, last, or a list of numbers, got {options.layers!r}")
    kinds = {"target": Target, "space": Space, "positions": Positions, "boundary": Boundary, "answer_with": Answers}
    for name, kind in kinds.items():
        if getattr(options, name) not in get_args(kind):
            raise ValueError(f"{name}: must be one of {', '.join(get_args(kind))}, got {getattr(options, name)!r}")
