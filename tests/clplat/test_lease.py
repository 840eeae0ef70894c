"""One process works on a folder, whichever of several machines it is on; what is left by one that is gone is free."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from studies import assert_same, everything, run_folder, study

from clplat import lease
from clplat.errors import RunBusyError
from clplat.execution import execute
from clplat.journal import Journal, last_status
from clplat.learner import Learner

FORK = multiprocessing.get_context("fork")
ELSEWHERE = {"host": "node7", "machine": "another", "pid": 1, "start": "1"}


def left_behind(folder: Path, seconds: float, number: int = 1, **holder: Any) -> Path:
    """A lease of another machine whose last heartbeat is so old."""
    path = folder / f"lease-{number:06d}"
    path.write_text(json.dumps(ELSEWHERE | holder))
    moment = path.stat().st_mtime - seconds
    os.utime(path, (moment, moment))
    return path


def test_a_folder_is_one_process_s_until_it_is_given_back(tmp_path: Path) -> None:
    with lease.held(tmp_path):
        assert lease.is_busy(tmp_path) and lease.holder(tmp_path) == lease.this_process()
        with pytest.raises(RunBusyError, match=f"process {os.getpid()} on .* works on this run already"):
            lease.take(tmp_path)
    assert not lease.is_busy(tmp_path) and lease.holder(tmp_path) is None
    with lease.held(tmp_path):
        assert len(list(tmp_path.iterdir())) == 1


def test_of_processes_that_race_for_a_lease_whose_holder_fell_silent_one_gets_it(tmp_path: Path) -> None:
    """Each round is a folder; all begin at once, and those that come later meet one that beats."""
    racers, rounds = 4, 25
    gate, won = FORK.Barrier(racers), FORK.Array("i", rounds)
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        left_behind(tmp_path / str(number), lease.SILENCE_SECONDS + 60, number=3)

    def race() -> None:
        for number in range(rounds):
            gate.wait(60)
            try:
                lease.take(tmp_path / str(number))
            except RunBusyError:
                continue
            with won.get_lock():
                won[number] += 1
        gate.wait(60)

    children = [FORK.Process(target=race) for _ in range(racers)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * racers
    assert list(won) == [1] * rounds
    assert all([path.name for path in (tmp_path / str(n)).iterdir()] == ["lease-000004"] for n in range(rounds))


@pytest.mark.parametrize(("silent", "busy"), [(0, True), (lease.SILENCE_SECONDS - 30, True), (1e6, False)])
def test_a_holder_on_another_machine_is_believed_to_live_while_it_beats(
    tmp_path: Path, silent: float, busy: bool
) -> None:
    left_behind(tmp_path, silent)
    assert lease.is_busy(tmp_path) is busy
    if busy:
        with pytest.raises(RunBusyError, match="process 1 on node7 works on this run.*free 120 s after its last"):
            lease.take(tmp_path)
    else:
        assert lease.take(tmp_path) and lease.is_busy(tmp_path)


def test_a_holder_that_is_dead_on_this_machine_is_known_to_be_at_once(tmp_path: Path) -> None:
    child = FORK.Process(target=lambda: (lease.take(tmp_path), os.kill(os.getpid(), signal.SIGKILL)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and not lease.is_busy(tmp_path)
    # Nor does a process that was given the same id since pass for it.
    left_behind(tmp_path, 0, number=9, **vars(lease.this_process()) | {"start": "12"})
    assert not lease.is_busy(tmp_path)


def test_a_holder_that_is_halted_on_this_machine_is_waited_for_however_long(tmp_path: Path) -> None:
    left_behind(tmp_path, 1e6, **vars(lease.this_process()))
    assert lease.is_busy(tmp_path)


def test_the_heartbeat_goes_on_while_the_holder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    with lease.held(tmp_path):
        path = tmp_path / "lease-000001"
        os.utime(path, (0, 0))
        for _ in range(1000):
            if path.stat().st_mtime > 0:
                break
            threading.Event().wait(0.01)
        assert path.stat().st_mtime > 0


def test_a_slow_taker_of_an_old_lease_yields_to_the_one_that_came_after(tmp_path: Path, monkeypatch) -> None:
    """It found number 1 free, and by the time it makes number 2 that was taken, given back, and is number 3 already."""
    left_behind(tmp_path, 1e6)
    newest = lease._newest(tmp_path)
    (tmp_path / "lease-000001").unlink()
    left_behind(tmp_path, 0, number=3)
    monkeypatch.setattr(lease, "refuse_busy", lambda _: newest)
    with pytest.raises(RunBusyError, match="at this moment"):
        lease.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lease-000003"]


def test_a_run_that_was_taken_over_while_it_was_halted_writes_nothing_more(tmp_path: Path, monkeypatch) -> None:
    whole, folder = (run_folder(tmp_path, study(), name) for name in ("whole", "halted"))
    execute(whole)
    original, before = Learner.batch_done, dict[str, bytes]()

    def halted(self: Learner, *arguments: Any) -> None:
        original(self, *arguments)
        if self.global_steps == 17 and not before:
            left_behind(folder, 0, number=2)
            before.update({str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()})

    monkeypatch.setattr(Learner, "batch_done", halted)
    with pytest.raises(RunBusyError, match="process 1 on node7 has taken this run over"):
        execute(folder)
    after = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before and {p: c for p, c in after.items() if "lease-000001" not in p} == {
        p: c for p, c in before.items() if "lease-000001" not in p
    }
    left_behind(folder, 1e6, number=2)
    assert execute(folder).status == last_status(folder) == "FINISHED"
    assert_same(everything(whole), everything(folder))


def test_a_journal_asks_before_it_writes(tmp_path: Path) -> None:
    def taken() -> None:
        raise RunBusyError("taken over")

    journal = Journal(tmp_path, taken)
    journal.status("RUNNING")
    with pytest.raises(RunBusyError):
        journal.flush()
    assert not (tmp_path / "journal.jsonl").exists()
