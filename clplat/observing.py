"""Controllers and the run: what they are told, what they decide, and that it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clplat.errors import ConfigError
from clplat.strategies.controllers.base import Controller, Event
from clplat.streams.base import Task

if TYPE_CHECKING:
    from clplat.loop import Run


def check_probes(controllers: Mapping[str, Controller], tasks: Sequence[Task]) -> None:
    """Refuse a controller that asks for probe losses where a task has no validation set to measure them on."""
    for name, controller in controllers.items():
        if not controller.probe_rows:
            continue
        for task in tasks:
            if task.val is None or "loss" not in task.val.scorer.metrics:
                raise ConfigError(
                    f"strategies.{name}: steers by losses on validation sets, and task {task.name!r} has none with a "
                    "loss; give the stream one (val_fraction, holdout or the like), or use signal: buffer"
                )


def observe(run: Run, kind: Any, controllers: Mapping[str, Controller], *, loss: float | None = None) -> None:
    """Let controllers decide, carry it out, and write every decision down with what it came from."""
    if not controllers:
        return
    event = _event(run, kind, controllers, loss)
    for name, controller in controllers.items():
        for action in controller.observe(event):
            run.parts.hooks.apply(action)
            if run.journal is not None:
                run.journal.decision(kind, event.step, action.strategy, action.knob, action.value, event.task)
        if run.journal is not None and (found := controller.measurements()):
            run.journal.metrics(event.step, {f"controller/{name}/{key}": value for key, value in found.items()})


def _event(run: Run, kind: Any, controllers: Mapping[str, Controller], loss: float | None) -> Event:
    task = run.parts.context.task
    assert task is not None
    rows = max(controller.probe_rows for controller in controllers.values())
    probes: dict[str, float] = {}
    if rows and kind in ("step", "boundary"):
        with run.costs.timed("evaluation"):
            probes = run.parts.evaluator.probe_losses(run.tasks_seen(task), rows)
    return Event(
        kind=kind, step=run.parts.learner.global_steps, task=task.name, loss=loss, forgetting=run.forgetting,
        signals=run.parts.hooks.signals(), probes=probes,
    )  # fmt: skip
