"""Two processes that train one run are the same experiment as one process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from group_runs import finished, stop_at_step
from lightning.pytorch.strategies import DDPStrategy
from studies import assert_same, run_folder, study

import clplat
from clplat import execution
from clplat.checkpoint import Checkpoints
from clplat.config import TrainingConfig, save
from clplat.execution import Outcome, execute
from clplat.journal import Journal, last_status, read, table
from clplat.strategies.buffers import BEST
from clplat.study import conclude
from clplat.study_file import expand, load_study
from clplat.terminal import terminal
from clplat.trainer import new_trainer

ARMS: dict[str, dict[str, Any]] = {
    "naive": {},
    "er": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 30, "ratio": 0.5}}},
    "controlled": {
        "controller": {"class_path": "ReplayController", "init_args": {"every": 2, "law": {"ratio_slope": 0.0}}},
        "replay": {
            "class_path": "ExperienceReplay",
            "init_args": {"capacity": 30, "policy": "ring_reservoir", "from_task": 1},
        },
    },
    "gem": {"gem": {"class_path": "GEM", "init_args": {"patterns_per_task": 20}}},
    "gdumb": {"gdumb": {"class_path": "GDumb", "init_args": {"capacity": 30}}},
    "icarl": {"icarl": {"class_path": "iCaRL", "init_args": {"capacity": 30}}},
}


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_give_the_weights_buffers_and_journal_of_one(tmp_path: Path, arm: str) -> None:
    data = study(
        strategies=ARMS[arm], architecture={"class_path": "MLP", "init_args": {"hidden_sizes": [16]}},
        training__budget={"steps": 6},
    )  # fmt: skip
    alone, together = run_folder(tmp_path, data, "alone"), run_folder(tmp_path, data | two(data), "together")
    assert execute(alone).status == "FINISHED"
    outcome = execute(together)
    assert outcome.status == last_status(together) == "FINISHED", outcome.reason
    one, both = (Checkpoints(folder, every_seconds=0).load() for folder in (alone, together))
    assert one is not None and both is not None
    for name, weight in one["architecture"].items():
        torch.testing.assert_close(both["architecture"][name], weight, rtol=1e-4, atol=1e-5)
    if arm in ("er", "controlled"):
        mine, theirs = (state["strategies"]["replay"]["state"]["buffer"] for state in (one, both))
        for name, rows in mine["rows"].items():
            # Losses that are kept beside rows are sums in another order.
            torch.testing.assert_close(
                theirs["rows"][name], rows, rtol=1e-4 * (name == BEST), atol=1e-5 * (name == BEST)
            )
    assert table(alone).rows() == table(together).rows() == [0, 1, 2, 3]
    kinds = [[entry["kind"] for entry in read(folder)] for folder in (alone, together)]
    assert kinds[0] == kinds[1], "rank zero alone writes the journal"


def test_a_run_goes_on_in_two_processes_and_then_in_one_with_the_buffer_of_one(tmp_path: Path) -> None:
    replay = {"capacity": 31, "policy": "ring_reservoir", "from_task": 1, "ratio": 0.5}
    data = study(
        strategies={"replay": {"class_path": "ExperienceReplay", "init_args": replay}}, training__budget={"steps": 6},
        architecture={"class_path": "MLP", "init_args": {"hidden_sizes": [16]}}, tracking__log_every=1,
    )  # fmt: skip
    alone, moved = run_folder(tmp_path, data, "alone"), run_folder(tmp_path / "left", data)
    assert execute(alone).status == "FINISHED"
    stop_at_step(moved, 0, 4)
    save(expand(load_study(data | two(data)))[0], moved / "config.yaml")
    # The first of them alone is asked to stop; the other takes part in what it saves.
    assert len(finished(tmp_path, 2)) == 2
    save(expand(load_study(data))[0], moved / "config.yaml")
    assert execute(moved).status == "FINISHED"
    one, other = (Checkpoints(folder, every_seconds=0).load() for folder in (alone, moved))
    assert one is not None and other is not None
    assert one["global_steps"] == other["global_steps"] == 18
    assert_same(*(state["strategies"]["replay"]["state"] for state in (one, other)))
    assert len(one["strategies"]["replay"]["state"]["buffer"]["rows"]["inputs"]) == 31
    for name, weight in one["architecture"].items():
        torch.testing.assert_close(other["architecture"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, ""),
        ({"RANK": "1"}, "run, process 1: FAILED. no room\n"),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, "run, process 0: FAILED. no room\n"),
    ],
)
def test_a_failure_is_said_in_words_and_once_by_whoever_started_the_processes(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Outcome(folder=Path("run"), status="FAILED", reason="no room", code=1)
    monkeypatch.setattr(execution, "execute", lambda folder, **_: failed)
    monkeypatch.setattr(sys, "argv", ["clplat.execution", "run"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert execution.main() == 1
    assert capsys.readouterr().err == said


COUNTED = """
from pathlib import Path
import torch.distributed as dist
from clplat.strategies.base import Strategy

class Counted(Strategy):
    asked = 0

    def setup(self, context):
        super().setup(context)
        broadcast = dist.broadcast

        def counted(*arguments, **options):
            self.asked += 1
            return broadcast(*arguments, **options)

        dist.broadcast = counted

    def step_end(self, outcome):
        Path(f"{self.context.world.rank}-{outcome.step}").write_text(str(self.asked))
"""


def test_steps_between_two_records_ask_no_other_process_but_for_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning asks before each of its batches whether to stop, and has the device wait for the answer."""
    Path("counting_strategy.py").write_text(COUNTED)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    data = study(
        strategies={"counted": {"class_path": "counting_strategy.Counted"}}, training__budget={"steps": 6}, tasks=1,
        tracking__log_every=50,
    )  # fmt: skip
    assert execute(run_folder(tmp_path, data | two(data))).status == "FINISHED"
    for rank in (0, 1):
        assert Path(f"{rank}-2").read_text() == Path(f"{rank}-6").read_text(), f"process {rank}"


def two(data: dict[str, Any]) -> dict[str, Any]:
    return {"training": data["training"] | {"devices": 2, "accelerator": "cpu"}}


@pytest.mark.parametrize(
    ("number", "code", "alone"), [(signal.SIGTERM, 75, False), (signal.SIGINT, 130, False), (signal.SIGINT, 130, True)]
)
def test_a_stop_while_processes_start_is_a_stop_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, alone: bool
) -> None:
    folder, original = run_folder(tmp_path, study() | two(study())), subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        child = original(*arguments, **options)
        if options["env"]["RANK"] == "1":
            # A terminal sends Ctrl-C to the children too, a person's `kill` does not.
            told = [os.getpid()] if alone else [child.pid, os.getpid()]
            threading.Timer(0.3, lambda: [os.kill(pid, number) for pid in told]).start()
        return child

    monkeypatch.setattr(subprocess, "Popen", started)
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = execute(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.status, outcome.code) == ("KILLED", code), outcome.reason
    # Rank zero may have come far enough to have written that it runs.
    assert "clplat resume" in outcome.reason and last_status(folder) in ("WAITING", "KILLED")


def test_a_run_one_of_whose_processes_was_killed_failed_and_says_how_it_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.status("RUNNING")
    journal.flush()
    outcome = execution._outcome_of_group(tmp_path, -9)
    assert (outcome.status, last_status(tmp_path)) == ("FAILED", "FAILED")
    assert outcome.reason.startswith(f"a process of the run ended with code -9; `clplat resume {tmp_path}` goes on")
    assert outcome.cause == "process"  # which is begun again, and is not said to fail again


FAILS = """
import os
from clplat.strategies.base import Strategy


class Broken(Strategy):
    "One process cannot read its rows."

    def batch(self, batch):
        if os.environ.get("RANK") == "1":
            raise ValueError("cannot read [/data/x] [red] :x:")
        return batch
"""


def test_what_failed_first_on_any_process_is_what_the_study_says_with_its_traceback_and_brackets_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    arms = {"broken": {"strategies": {"b": {"class_path": "fails.Broken"}}}, "naive": {}}
    data = study(variants=arms, training__budget={"steps": 3}, launcher={"workers": 1})
    done = clplat.run(data | two(data))
    broken, naive = done.outcomes
    assert (broken.status, broken.cause, naive.status) == ("FAILED", "", "FINISHED")
    trace = broken.folder / "error-of-process-1.txt"
    assert broken.reason == f"process 1: ValueError: cannot read [/data/x] [red] :x: (traceback in {trace})"
    assert "in batch\n" in trace.read_text() and last_status(broken.folder) == "FAILED"
    said = capsys.readouterr().out
    assert broken.reason in said
    conclude(done, terminal())
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot read [/data/x] [red] :x:" in said and "A run that failed of itself will fail again" in said


def test_a_port_that_somebody_takes_meanwhile_stops_no_process(tmp_path: Path, monkeypatch: Any) -> None:
    taken, original = [], subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        if options["env"]["RANK"] == "0":
            # What another program would do that asks for this very port.
            with socket.socket() as other, contextlib.suppress(OSError):
                other.bind(("127.0.0.1", int(options["env"]["MASTER_PORT"])))
                taken.append(True)
        return original(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", started)
    folder = run_folder(tmp_path, study() | two(study(training__budget={"steps": 2})))
    assert execute(folder).status == "FINISHED" and not taken


def test_a_batch_that_two_processes_cannot_share_is_refused_by_name(tmp_path: Path) -> None:
    from clplat.errors import ConfigError
    from clplat.loaders import RowOrder

    with pytest.raises(ConfigError, match="training.batch_size: 15 rows cannot be split over 2 processes"):
        RowOrder(100, batch_size=15, seed=0, task=0, rank=0, size=2)


def test_a_process_keeps_its_own_rank_inside_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_ID": "1", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    strategy = new_trainer(TrainingConfig(), torch.device("cpu"), 2).strategy
    assert isinstance(strategy, DDPStrategy) and strategy.local_rank == 1
    assert new_trainer(TrainingConfig(), torch.device("cpu"), 1).num_devices == 1
