"""Holding the model to what it answered: dark experience replay, learning without forgetting."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Architecture, Output
from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.strategies.buffers import Policy
from clplat.strategies.class_tables import classes_seen
from clplat.strategies.replay import ExperienceReplay, current_rows
from clplat.streams.base import Task
from clplat.streams.batch import AUXILIARY, CURRENT, IGNORE, REPLAY, Batch


class DERpp(ExperienceReplay):
    """Dark experience replay ++: one draw is held to its stored logits, another to its labels.

    Both draws go through the model together with the current rows. On language every token would bring a whole
    vocabulary of logits: there `top_logits` keeps the largest few, and the distance is taken over these alone (our
    form; the paper has classification only).
    """

    shards = True
    knobs: ClassVar[tuple[str, ...]] = ("ratio", "alpha", "beta", "weight", "long_share")
    paper = "Buzzega et al. 2020, arXiv:2004.07211, Eq. 6"
    fidelity: ClassVar[Fidelity] = "exact"
    draws: ClassVar[int] = 2

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        alpha: float = 0.3,
        beta: float = 0.5,
        from_task: int = 2,
        top_logits: int | None = None,
        draw_from: Literal["all", "past"] = "all",
    ) -> None:
        """`alpha` weighs the mean squared distance to stored logits, `beta` the cross-entropy of the second draw.

        Each draw has `ratio`/2 rows for each current one, so that a step replays as many rows as with
        `ExperienceReplay` at the same ratio: labels get
        the odd one. The paper draws a whole batch for each term from the first task on:
        `ratio` 2, `from_task` 1. `top_logits` of each answer are kept, in half precision; None keeps them all.
        `draw_from` as in `ExperienceReplay`.
        """
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, from_task=from_task,
            draw_from=draw_from,
        )  # fmt: skip
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha, beta: must not be negative, got {alpha} and {beta}")
        if top_logits is not None and top_logits < 1:
            raise ValueError(f"top_logits: must be positive, got {top_logits}")
        self.alpha, self.beta, self.top_logits = alpha, beta, top_logits

    def setup(self, context: Context) -> None:
        name, outputs = type(self).__name__, context.spec.num_outputs
        if context.spec.kind == "language" and self.top_logits is None:
            raise ValueError(
                f"{name}.top_logits: {outputs} logits would be stored for every token; say how many of them to keep"
            )
        if self.top_logits is not None and self.top_logits > outputs:
            raise ValueError(f"{name}.top_logits: the model has only {outputs} outputs, got {self.top_logits}")
        super().setup(context)
        self.matched = slice(0, 0)

    def row_bytes(self) -> int:
        # Four bytes a logit, or two and the four of its number.
        one = 6 * self.top_logits if self.top_logits else 4 * self.context.spec.num_outputs
        return super().row_bytes() + one * self.context.tasks[0].train.batch(torch.tensor([0])).targets.numel()

    def batch(self, batch: Batch) -> Batch:
        self.fresh.append(current_rows(batch))
        # Attribute `weight`, 1 unless a controller sets it, is a factor of both.
        alpha, beta = self.weight * self.alpha, self.weight * self.beta
        # Rounded before it is split: half of one row each would round to none at all.
        rows = len(self.fresh[-1])
        wanted = round(self.ratio * rows)
        larger = -(-wanted // self.draws)
        matched = wanted - larger if beta and self.draws > 1 else larger
        mixed = self.with_replay(batch, AUXILIARY, matched / rows if alpha else 0.0, 0.0)
        self.matched = slice(len(batch), len(mixed))
        return self.with_replay(mixed, REPLAY, larger / rows if beta else 0.0, beta)

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        # Current rows stand first in a mixed batch; what the model answers now is what it is held to later.
        current = self.fresh[-1]
        self.fresh[-1] = replace(current, extra=self._kept(output.logits[: len(current)].detach()))
        if self.matched.start == self.matched.stop:
            return None
        answers = output.logits[self.matched]
        if self.top_logits:
            answers = answers.gather(-1, batch.extra["places"][self.matched])
        return self.weight * self.alpha * F.mse_loss(answers.float(), batch.extra["logits"][self.matched].float())

    def _kept(self, logits: Tensor) -> dict[str, Tensor]:
        """What the buffer keeps of an answer: all its logits, or the largest and their places."""
        if not self.top_logits:
            return {"logits": logits.float()}
        largest = logits.topk(self.top_logits, dim=-1)
        return {"logits": largest.values.half(), "places": largest.indices}


class DER(DERpp):
    """Dark experience replay: one draw from the buffer is held to its stored logits, and labels are not replayed.

    This is `DERpp` with `beta` 0, but for the draw, which has `ratio` rows for each current one.
    """

    knobs = ("ratio", "alpha", "weight", "long_share")
    paper = "Buzzega et al. 2020, arXiv:2004.07211"
    draws = 1

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        alpha: float = 0.3,
        from_task: int = 2,
        top_logits: int | None = None,
        draw_from: Literal["all", "past"] = "all",
    ) -> None:
        """`alpha` weighs the mean squared distance to stored logits; the others as in `DERpp`."""
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, alpha=alpha, beta=0.0,
            from_task=from_task, top_logits=top_logits, draw_from=draw_from,
        )  # fmt: skip


class LwF(Strategy):
    """Learning without forgetting: on the current inputs the model is held to what it answered before the task.

    β CE + α T² Σ_heads KL(softmax(old / T) ‖ softmax(new / T)), the mean over current rows; replayed ones are left
    out, unless `rows` says otherwise. In the `task` scenario every earlier task is a head, in the `class` scenario all
    classes met before the task are one, else the whole output is. The old answers come from a copy of the model as the
    last task left it, in evaluation mode.
    """

    knobs: ClassVar[tuple[str, ...]] = ("alpha",)
    paper = "Li & Hoiem 2016, arXiv:1606.09282, Sec. 3"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        alpha: float | list[float] = 1.0,
        temperature: float = 2.0,
        loss_weight: Literal["one", "share"] = "one",
        softmax: Literal["old", "seen"] = "old",
        rows: Literal["current", "replayed", "all"] = "current",
    ) -> None:
        """`alpha` is α, a number or a list with one for each task (the first task has nothing to be held to); with
        nothing but 0 no model is kept. `temperature` is T: at 2 small chances of the old answer count more.
        `loss_weight` is β, the weight of the loss on current rows: one, or the current task's share of the tasks so
        far, 1/n, as in van de Ven & Tolias 2019 (there α is 1 − 1/n). `softmax` of the new answers: among the classes
        of the old ones, or (`seen`, in the class scenario, as there) among the current task's too, which current rows
        must then not be taken for. `rows` are held to the old answers: current ones, as in the paper, those that
        another strategy replays, or all. With `replayed`, and standing before the replay in the configuration, the copy
        is asked about these rows alone."""
        schedule = alpha if isinstance(alpha, list) else [alpha]
        if min(schedule, default=-1.0) < 0:
            raise ValueError(f"alpha: give a number that is not negative, or one for each task; got {alpha}")
        if loss_weight not in ("one", "share"):
            raise ValueError(f"loss_weight: must be one or share, got {loss_weight!r}")
        if softmax not in ("old", "seen"):
            raise ValueError(f"softmax: must be old or seen, got {softmax!r}")
        if rows not in ("current", "replayed", "all"):
            raise ValueError(f"rows: must be current, replayed or all, got {rows!r}")
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.alpha, self.temperature, self.loss_weight, self.softmax = schedule[0], temperature, loss_weight, softmax
        self.schedule, self.rows, self.first = schedule if isinstance(alpha, list) else [], rows, 0
        self.teacher: Architecture | None = None
        self.units: list[list[int]] = []
        self.heads: list[Tensor | slice] = []

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.schedule and len(self.schedule) < len(context.tasks):
            raise ValueError(f"LwF.alpha: {len(self.schedule)} numbers for {len(context.tasks)} tasks; "
                             "give one for each, or a single number for all")  # fmt: skip
        if self.softmax == "seen":
            if context.spec.kind == "language" or context.spec.scenario != "class":
                raise ValueError("LwF.softmax: seen is for classes in the class scenario; use old")
            self.seen = classes_seen(context, "LwF")

    def task_start(self, task: Task) -> None:
        if self.schedule:
            self.alpha = self.schedule[len(self.context.past)]

    def batch(self, batch: Batch) -> Batch:
        # Rows of the current task stand first; how many they are is known here, if nothing was mixed in before.
        self.first = len(batch) if batch.origin is None and self.rows == "replayed" else 0
        if self.loss_weight == "one" or not self.context.past:
            return batch
        mixed = batch if batch.origin is not None else batch.with_origin(CURRENT)
        weight = torch.ones_like(mixed.origin, dtype=torch.float32) if mixed.weight is None else mixed.weight
        share = 1 / (len(self.context.past) + 1)
        return mixed.replaced(weight=torch.where(mixed.origin == CURRENT, share * weight, weight))

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        if self.teacher is None or not self.alpha or (batch.origin is None and self.rows == "replayed"):
            return None
        new = output.logits
        if self.first:
            batch, new = batch.rows(slice(self.first, None)), new[self.first :]
        with torch.no_grad():
            old = self.teacher(batch).logits
        apart = sum(self._divergence(old[..., head], new[..., head], self._rivals(new, head)) for head in self.heads)
        counted = batch.targets != IGNORE
        if batch.origin is not None:
            wanted = {"current": batch.origin == CURRENT, "replayed": batch.origin == REPLAY}
            chosen = wanted.get(self.rows, batch.origin != AUXILIARY)
            counted = counted & chosen.view(-1, *[1] * (counted.ndim - 1))
        return self.alpha * self.temperature**2 * (apart * counted).sum() / counted.sum().clamp(min=1)

    def _rivals(self, new: Tensor, head: Tensor | slice) -> Tensor:
        """The logits among which the new answers of a head are a softmax."""
        if self.softmax == "old" or self.context.task is None:
            return new[..., head]
        return new.masked_fill(~self.seen[self.context.task.index], float("-inf"))

    def _divergence(self, old: Tensor, new: Tensor, rivals: Tensor) -> Tensor:
        """KL of the softened answers of one head, (B,) or (B, T)."""
        soft_old = (old.float() / self.temperature).log_softmax(-1)
        soft_new = new.float() / self.temperature - (rivals.float() / self.temperature).logsumexp(-1, keepdim=True)
        return F.kl_div(soft_new, soft_old, reduction="none", log_target=True).sum(-1)

    def task_end(self, task: Task) -> None:
        if not self.alpha and not any(self.schedule):
            return
        spec, classes = self.context.spec, [list(each.classes or ()) for each in (*self.context.past, task)]
        if spec.kind == "language" or spec.scenario not in ("task", "class"):
            classes = [[]]
        elif spec.scenario == "class":
            classes = [sorted({unit for group in classes for unit in group})]
        self._keep(classes)

    def _keep(self, units: list[list[int]]) -> None:
        """A copy of the model, and the output units of each of its heads (an empty list: all)."""
        self.teacher = copy.deepcopy(self.context.architecture).eval().requires_grad_(False)
        # Made once a task: a list that goes to the device in a step would make the step wait.
        device, self.units = self.context.device(), units
        self.heads = [torch.tensor(head, device=device) if head else slice(None) for head in units]

    def state_dict(self) -> dict[str, Any]:
        if self.teacher is None:
            return {"alpha": self.alpha, "teacher": None}
        weights, structure = dict(self.teacher.state_dict()), dict(self.teacher.structure())
        return {"alpha": self.alpha, "teacher": {"weights": weights, "structure": structure, "units": self.units}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alpha, saved = state["alpha"], state["teacher"]
        if saved is not None:
            self._keep(saved["units"])
            assert self.teacher is not None
            self.teacher.restructure(saved["structure"])
            self.teacher.load_state_dict(saved["weights"])
