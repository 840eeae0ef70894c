"""Evaluation leaves no trace: not in weights, not in random sources, not in modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from studies import REPLAY, run_folder, study

from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import curve_of, read
from clplat.strategies.world import World
from clplat.study_file import expand, load_study

NOISY = '''
from contextlib import contextmanager
import torch
from clplat.strategies.base import Strategy


class Noisy(Strategy):
    """A further view that draws random numbers while it is looked through."""

    def views(self):
        @contextmanager
        def shaken():
            weights = list(self.context.architecture.parameters())
            kept = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w in weights:
                    w.add_(0.01 * torch.randn_like(w))
                yield
                for w, k in zip(weights, kept):
                    w.copy_(k)
        return {"shaken": shaken}
'''


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    assert execute(folder).status == "FINISHED"
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    return state["architecture"]


def test_scoring_every_five_steps_or_never_gives_bit_equal_weights(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    arms = {"replay": REPLAY, "noisy": {"class_path": "noisy.Noisy"}}
    never = final_weights(run_folder(tmp_path, study(strategies=arms), "never"))
    often_folder = run_folder(tmp_path, study(strategies=arms, evaluation__every=5), "often")
    often = final_weights(often_folder)
    assert all(torch.equal(never[name], often[name]) for name in never)
    assert [step for step, _ in curve_of(read(often_folder)).as_curve()] == [5, 10, 15, 20, 25, 30, 35]
    views = {cell["view"] for entry in read(often_folder) if entry["kind"] == "curve" for cell in entry["cells"]}
    assert views == {"default", "shaken"}


class Summed(World):
    """One of several processes whose sums are its own."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("size", [1, 3])
def test_what_answers_need_of_other_processes_comes_before_each_set_also_where_none_of_its_rows_are_ones_own(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategies = {"own": {"class_path": "iCaRL", "init_args": {"capacity": 12}}}
    parts = assemble(expand(load_study(study(strategies=strategies, evaluation={"max_rows": 2})))[0], World())
    parts.context.task, called, own = parts.stream.tasks[0], [], parts.hooks.strategies["own"]
    monkeypatch.setattr(own, "prepare_predict", lambda: called.append(torch.is_grad_enabled()))
    parts.evaluator.world = Summed(rank=size - 1, size=size)
    cells = parts.evaluator.cells([0, 1])
    assert [cell.count for cell in cells if cell.metric == "accuracy"] == ([2, 2, 0] if size == 1 else [0, 0, 0])
    assert called == ([] if size == 1 else [False, False]), "of two tasks seen"


def test_modes_and_random_sources_are_as_before(tmp_path: Path) -> None:
    parts = assemble(expand(load_study(study()))[0], World())
    parts.architecture.train()
    parts.architecture.head.eval()
    before = torch.get_rng_state()
    modes = {name: module.training for name, module in parts.architecture.named_modules()}
    parts.evaluator.cells([0])
    assert torch.equal(before, torch.get_rng_state())
    assert modes == {name: module.training for name, module in parts.architecture.named_modules()}


def test_an_adaptive_scorer_works_on_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clplat.streams.scorers import Classify

    def spoiling(self: Classify, model: Any, data: Any, rows: Any, size: int) -> dict[str, torch.Tensor]:
        for weight in model.architecture.parameters():
            weight.zero_()
        return {name: torch.tensor([0.0, 1.0]) for name in self.metrics}

    parts = assemble(expand(load_study(study()))[0], World())
    before = [weight.clone() for weight in parts.architecture.parameters()]
    monkeypatch.setattr(Classify, "adaptive", True)
    monkeypatch.setattr(Classify, "score", spoiling)
    parts.evaluator.cells([0])
    assert all(torch.equal(a, b) for a, b in zip(before, parts.architecture.parameters(), strict=True))


def test_a_task_ends_early_once_its_validation_score_is_reached(tmp_path: Path) -> None:
    data = study(training__budget={"steps": 200, "until": 0.9}, evaluation__every=10)
    folder = run_folder(tmp_path, data)
    assert execute(folder).status == "FINISHED"
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    assert 30 <= state["global_steps"] < 600 and state["global_steps"] % 10 == 0


@pytest.mark.parametrize("limit", [None, 7])
def test_each_row_is_forwarded_once_for_all_metrics_and_no_more_rows_than_asked_for(limit: int | None) -> None:
    parts = assemble(expand(load_study(study(evaluation={"batch_size": 10, "max_rows": limit})))[0], World())
    rows: list[torch.Tensor] = []
    parts.architecture.register_forward_pre_hook(lambda _, given: rows.append(given[0].inputs))
    cells = parts.evaluator.cells([0, 1, 2])
    seen = torch.cat(rows)
    expected = [task.test.data.batch(torch.arange(len(task.test.data))).inputs for task in parts.stream.tasks]
    if limit is not None:
        expected = [inputs[torch.arange(limit) * len(inputs) // limit] for inputs in expected]
    assert torch.equal(seen, torch.cat(expected))
    assert {cell.metric for cell in cells} == {"accuracy", "loss"}
    assert {cell.count for cell in cells} == {float(len(inputs)) for inputs in expected}
