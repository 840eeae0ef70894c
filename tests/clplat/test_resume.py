"""A run that is killed anywhere and resumed equals one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from studies import EWC, REPLAY, assert_same, everything, run_folder, study

from clplat.checkpoint import Checkpoints
from clplat.errors import RunBusyError, StorageError
from clplat.execution import execute
from clplat.journal import last_status, table
from clplat.launch import launch
from clplat.launchers.local import Local
from clplat.learner import Learner
from clplat.strategies.regularization import OnlineEWC
from clplat.streams.scorers import Scorer

FORK = multiprocessing.get_context("fork")
MOMENTS: dict[str, tuple[type, str]] = {
    "training": (Learner, "training_step"),
    "after_step": (Learner, "batch_done"),
    "consolidation": (OnlineEWC, "task_end"),
    "evaluation": (Scorer, "score"),
    "saving": (Checkpoints, "save"),
}
COUNTS = {"training": 36, "after_step": 36, "consolidation": 3, "evaluation": 6, "saving": 45}


def in_child(action: Callable[[], Any]) -> int:
    """The exit code of a forked process that carries out `action`; negative when a signal ended it."""
    child = FORK.Process(target=action)
    child.start()
    child.join(timeout=600)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def killed_at(folder: Path, moment: str, count: int, *, halfway: bool) -> None:
    """Execute the run and die by SIGKILL at the count-th call of a moment, before or after it."""
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)
    left = count

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not halfway:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(self, *args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counting)
    execute(folder)


def config(workers: int) -> dict[str, Any]:
    return study(strategies={"replay": REPLAY, "ewc": EWC}, training__workers=workers)


@pytest.fixture(scope="module", params=[0, 2], ids=["workers=0", "workers=2"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    torch.set_num_threads(1)
    folder = run_folder(tmp_path_factory.mktemp("whole"), config(request.param))
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    return request.param, folder


def moments() -> list[tuple[str, int, bool]]:
    """Ten kills for each number of workers: every kind of moment twice, at random counts."""
    chance = random.Random(3)
    return [(kind, chance.randint(1, COUNTS[kind]), half) for kind in MOMENTS for half in (False, True)]


@pytest.mark.parametrize(("moment", "count", "halfway"), moments())
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    uninterrupted: tuple[int, Path], tmp_path: Path, moment: str, count: int, halfway: bool
) -> None:
    workers, whole = uninterrupted
    folder = run_folder(tmp_path, config(workers))
    assert in_child(lambda: killed_at(folder, moment, count, halfway=halfway)) == -signal.SIGKILL
    assert last_status(folder) == "RUNNING"
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))


def test_a_run_killed_three_times_equals_the_uninterrupted_one(uninterrupted: tuple[int, Path], tmp_path: Path) -> None:
    workers, whole = uninterrupted
    folder = run_folder(tmp_path, config(workers))
    for moment, count in (("training", 5), ("saving", 9), ("after_step", 11)):
        assert in_child(lambda: killed_at(folder, moment, count, halfway=True)) == -signal.SIGKILL  # noqa: B023
    assert in_child(lambda: execute(folder)) == 0
    assert_same(everything(whole), everything(folder))


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning_and_the_result_is_the_same(
    uninterrupted: tuple[int, Path], tmp_path: Path
) -> None:
    workers, whole = uninterrupted
    folder = run_folder(tmp_path, config(workers))
    in_child(lambda: killed_at(folder, "training", 20, halfway=False))
    newest = sorted((folder / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged or cut short"):
        assert Checkpoints(folder, every_seconds=0).load() is not None
    assert in_child(lambda: execute(folder)) == 0
    assert_same(everything(whole), everything(folder))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config(0))
    in_child(lambda: killed_at(folder, "training", 20, halfway=False))
    files = sorted((folder / "checkpoints").glob("*.pt"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StorageError, match="every checkpoint is damaged.*begins again"):
        Checkpoints(folder, every_seconds=0).load()
    assert sorted((folder / "checkpoints").glob("*.pt")) == files


def test_the_second_of_two_resumers_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config(0))
    (started, go_on) = FORK.Event(), FORK.Event()

    def slow() -> None:
        original = Learner.training_step

        def waiting(self: Learner, *args: Any) -> Any:
            started.set()
            assert go_on.wait(300)
            return original(self, *args)

        Learner.training_step = waiting
        execute(folder)

    first = FORK.Process(target=slow)
    first.start()
    assert started.wait(300)
    with pytest.raises(RunBusyError, match=f"process {first.pid} on .* works on this run"):
        execute(folder)
    outcome = launch([folder], launcher=Local(workers=1, threads=1), console=Console(quiet=True))[0]
    assert (outcome.status, last_status(folder)) == ("BUSY", "RUNNING")
    go_on.set()
    first.join(300)
    assert last_status(folder) == "FINISHED"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_a_true_status_and_an_exit_code_and_the_resumed_run_is_equal(
    tmp_path: Path, number: int, code: int
) -> None:
    data = config(0) | {"checkpoint": {"every_seconds": 1e9}}
    whole, folder = run_folder(tmp_path, data, "whole"), run_folder(tmp_path, data, "stopped")
    assert in_child(lambda: execute(whole)) == 0

    def signalled() -> None:
        original = Learner.batch_done

        def stepping(self: Learner, *args: Any) -> None:
            if self.global_steps == 17:
                os.kill(os.getpid(), number)
            original(self, *args)

        Learner.batch_done = stepping
        os._exit(execute(folder).code)

    assert in_child(signalled) == code
    assert last_status(folder) == "KILLED"
    assert len(list((folder / "checkpoints").glob("*.pt"))) == 1
    assert in_child(lambda: execute(folder)) == 0
    assert last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))
    assert table(folder).rows() == table(whole).rows()
