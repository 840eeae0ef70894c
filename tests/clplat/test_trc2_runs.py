"""TRC² as a run: interrupted ones end as others do, two processes hold one store, strategies and compilers go along."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import assert_same, everything, run_folder, study

from clplat.architectures.trc2.store import Experience, Store
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import last_status
from clplat.learner import Learner

FORK = multiprocessing.get_context("fork")
REPLAY = {"class_path": "ExperienceReplay", "init_args": {"capacity": 20, "ratio": 0.5, "from_task": 1}}
MODEL: dict[str, Any] = {
    "class_path": "TRC2",
    "init_args": {
        "hidden_size": 16,
        "num_layers": 2,
        "column": {"num_heads": 2, "heads_per_kv": 2, "num_experts": 2, "inner_size": 16},
        "thalamus": {"rank": 8},
        "hippocampus": {"slots": 24, "k_read": 4},
        "write": {"chunk": 4, "quota": 4, "threshold": 0.0},
    },
}


def config(**changes: Any) -> dict[str, Any]:
    stream = {"class_path": "StdlibText", "init_args": {"block_size": 16, "max_train_tokens": 4000}}
    defaults = {
        "stream": stream,
        "architecture": MODEL,
        "strategies": {"replay": REPLAY},
        "training__budget": {"steps": 4},
        "training__batch_size": 8,
        "training__accumulate": 2,
        "training__optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
    }
    return study(**(defaults | changes))


def memory(folder: Path) -> dict[str, torch.Tensor]:
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    return {name: value for name, value in state["architecture"].items() if name.startswith("store.")}


FLUSHED: list[Experience] = []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder, original = run_folder(tmp_path_factory.mktemp("whole"), config()), Store.flush

    def noting(self: Store, seen: Experience, **rest: Any) -> None:
        FLUSHED.append(seen)
        original(self, seen, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "flush", noting)
        outcome = execute(folder)
    assert outcome.status == "FINISHED", (folder / "error.txt").read_text()
    return folder


def test_an_optimizer_step_writes_once_from_the_current_rows_of_all_its_batches(uninterrupted: Path) -> None:
    assert len(FLUSHED) == 12
    for seen in FLUSHED[4:]:
        # Two batches of 8 current rows, each with 4 of replay.
        assert seen.hidden.shape == (24, 16, 16) and seen.loss.shape == (24, 16)
        assert seen.counted.any(1).tolist() == 2 * ([True] * 8 + [False] * 4)


def test_a_run_killed_inside_tasks_and_taken_up_again_has_the_same_store_critics_and_scores(
    uninterrupted: Path, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, config())

    def killed(at: int) -> None:
        original = Learner.batch_done

        def counting(self: Learner) -> None:
            original(self)
            if self.global_steps == at:
                os.kill(os.getpid(), signal.SIGKILL)

        Learner.batch_done = counting
        execute(folder)

    child = FORK.Process(target=killed, args=(6,))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL and last_status(folder) == "RUNNING"
    child = FORK.Process(target=execute, args=(folder,))
    child.start()
    child.join(300)
    assert last_status(folder) == "FINISHED"
    assert_same(everything(uninterrupted), everything(folder))
    kept = memory(folder)
    assert kept["store.used"].any() and kept["store.critics.steps"] == 12 and kept["store.critics.moments"].any()


def test_how_often_is_evaluated_changes_nothing_in_the_store(uninterrupted: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, config(evaluation__every=2))
    assert execute(folder).status == "FINISHED"
    assert_same(memory(uninterrupted), memory(folder))


@pytest.mark.long
def test_one_compiled_graph_trains_the_same(uninterrupted: Path, tmp_path: Path, monkeypatch) -> None:
    folder = run_folder(tmp_path, config(training__compile=True))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
    for name, value in memory(uninterrupted).items():
        torch.testing.assert_close(memory(folder)[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_two_processes_under_torchs_wrapper_fill_the_store_as_one_does(tmp_path: Path) -> None:
    # Losses are means over a process's own rows, so that weights, and what is written, differ a little.
    plain = MODEL | {"init_args": MODEL["init_args"] | {"dropout": 0.0}}
    data = config(strategies={}, architecture=plain, training__accumulate=1)
    alone = run_folder(tmp_path, data, "alone")
    assert execute(alone).status == "FINISHED", (alone / "error.txt").read_text()
    together = run_folder(
        tmp_path, data | {"training": data["training"] | {"devices": 2, "accelerator": "cpu"}}, "both"
    )
    outcome = execute(together)
    assert outcome.status == "FINISHED", outcome.reason
    one, two = memory(alone), memory(together)
    assert one["store.used"].any() and two["store.critics.steps"] == one["store.critics.steps"]
    torch.testing.assert_close(two["store.statistics"], one["store.statistics"], rtol=0.05, atol=1e-4)
    assert abs(int(two["store.used"].sum()) - int(one["store.used"].sum())) <= 4
