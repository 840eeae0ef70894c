"""A run that is stopped inside a task and goes on, beside one that nobody stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import assert_same, everything, run_folder

from clplat.execution import execute
from clplat.journal import last_status
from clplat.learner import Learner


class Killed(Exception):
    """Stands in for the end of the process."""


def assert_resumes_as_if_never_stopped(data: dict[str, Any], *, step: int, folder: Path) -> None:
    """Runs the study's first run whole, and once more with an end before optimizer step number `step` and a resume;
    all that must not depend on interruptions is equal."""
    whole, stopped = run_folder(folder / "whole", data), run_folder(folder / "stopped", data)
    execute(whole)
    original = Learner.training_step

    def training_step(self: Learner, *arguments: Any) -> None:
        if self.global_steps == step:
            raise Killed
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "training_step", training_step)
        execute(stopped)
    assert last_status(stopped) == "FAILED"
    execute(stopped)
    assert last_status(stopped) == last_status(whole) == "FINISHED"
    assert_same(everything(whole), everything(stopped))
