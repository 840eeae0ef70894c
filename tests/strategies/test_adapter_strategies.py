"""Adapters for every task: O-LoRA's add up in free directions, those of the reference answer their own task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_toys import RANK, adapted_run, ours, remembering, theirs, toy_folder

from clplat.architectures.adapters import AdapterHost, backbone_checksum
from clplat.architectures.base import Output
from clplat.objective import Objective
from clplat.strategies.adapter_per_task import AdapterPerTask
from clplat.strategies.base import Strategy
from clplat.strategies.ilora import ILoRA
from clplat.strategies.olora import OLoRA
from clplat.strategies.reference import Cumulative, Naive, ZeroShot
from clplat.strategies.regularization import EWC
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import STEPS, ToyRun, toy_stream

SPEC, TASKS = toy_stream("language")


@pytest.fixture(params=["ours", "peft"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> AdapterHost:
    return ours(SPEC) if request.param == "ours" else theirs(toy_folder(tmp_path), SPEC)


def answers(model: AdapterHost, task: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(TASKS[task].train.batch(torch.arange(3))).logits


def test_the_first_task_of_olora_is_naive_training_bit_for_bit(model: AdapterHost) -> None:
    start = answers(model)
    run = adapted_run(OLoRA(), model=model)
    assert torch.equal(answers(model), start)
    run.train(STEPS)
    with model.answering():
        assert torch.equal(answers(model), start)
    if not hasattr(model, "source"):
        naive = adapted_run(Naive()).train(STEPS)
        assert torch.equal(answers(model), answers(naive.architecture))


def test_a_tasks_new_adapter_changes_no_bit_and_earlier_ones_stay_and_answer(model: AdapterHost) -> None:
    strategy = OLoRA()
    run = adapted_run(strategy, model=model).train(STEPS)
    before = answers(model)
    kept = {name: p.detach().clone() for name, p in model.adapter_parameters("default").items()}
    run.context.past, run.context.task = run.path[:1], run.path[1]
    strategy.task_start(run.path[1])
    assert torch.equal(answers(model), before) and model.active == ("default", "task1") and model.trained == ("task1",)

    run = adapted_run(OLoRA(), model=model_like(model)).train()
    after = run.architecture
    assert after.active == ("default", "task1", "task2") and after.trained == ("task2",)
    assert all(torch.equal(p, kept[name]) for name, p in after.adapter_parameters("default").items())
    assert backbone_checksum(after.backbone) == after.checksum


def model_like(model: AdapterHost) -> AdapterHost:
    return theirs(Path(model.source.name), SPEC) if hasattr(model, "source") else ours(SPEC)


def test_its_penalty_is_the_sum_over_modules_and_earlier_adapters(model: AdapterHost) -> None:
    strategy = OLoRA(orthogonality=0.7, norm=0.3)
    adapted_run(strategy, model=model).train(2 * STEPS + 2)
    found = strategy.penalty(Output(logits=torch.zeros(1)), TASKS[0].train.batch(torch.arange(1)))
    assert found is not None
    factors = {name: {n: p.detach().double() for n, p in model.adapter_parameters(name).items()}
               for name in ("default", "task1", "task2")}  # fmt: skip
    overlap = 0.0
    for name, new in factors["task2"].items():
        for earlier in ("default", "task1") if name.endswith("lora_A") else ():
            for row in factors[earlier][name]:
                for other in new:
                    overlap += abs(float(row @ other))
    norms = sum(float(new.square().sum().sqrt()) for new in factors["task2"].values())
    assert len(factors["task2"]) >= 8 and next(iter(factors["task2"].values())).shape[0] == RANK
    assert float(found.detach()) == pytest.approx(0.7 * overlap + 0.3 * norms, rel=1e-5)
    model.zero_grad()
    found.backward()
    assert all(p.grad is not None for p in model.adapter_parameters("task2").values())
    assert all(p.grad is None for p in model.adapter_parameters("task1").values())


def test_a_strong_penalty_leaves_less_overlap() -> None:
    overlaps = []
    for strength in (0.0, 0.5):
        strategy = OLoRA(orthogonality=strength)
        run = adapted_run(strategy)
        # Their difference is the penalty's alone: without it training barely moves A away from its draw.
        for group in run.train(STEPS).optimizer.param_groups:
            group["lr"] = 1e-3
        run.train()
        overlaps.append(float(strategy.overlap().detach()))
    assert overlaps[1] < 0.9 * overlaps[0]


def test_each_task_is_answered_by_its_own_adapter_and_one_to_come_by_the_backbone(model: AdapterHost) -> None:
    strategy = AdapterPerTask()
    run, ends = adapted_run(strategy, model=model), []
    alone = answers(model, 2)
    for task in range(2):
        run.train((task + 1) * STEPS)
        ends.append(answers(model, task))
    for task in range(2):
        with strategy.told(TASKS[task]):
            assert torch.equal(answers(model, task), ends[task])
    assert not torch.equal(answers(model, 0), ends[0]), "the last task's adapter answers where no task is told"
    with strategy.told(TASKS[2]):
        assert torch.equal(answers(model, 2), alone)
    assert model.active == model.trained == ("task1",)


def test_zero_shot_pays_for_no_step() -> None:
    run = adapted_run(ZeroShot())
    assert list(run.strategies[0].budget_tasks(run.path[0])) == []


@pytest.mark.parametrize("other", [Naive, Cumulative, lambda: ExperienceReplay(capacity=4), OLoRA, AdapterPerTask])
def test_zero_shot_refuses_whatever_would_train_or_store_beside_it(other: Any) -> None:
    with pytest.raises(ValueError, match="ZeroShot trains nothing, so that strategies.1 .* would do nothing; leave"):
        ToyRun([ZeroShot(), other()], Objective, "language", model=ours)


def test_zero_shot_may_be_read_in_another_way() -> None:
    class Read(Strategy):
        def views(self):
            return {"bare": self.context.architecture.answering}

    adapted_run(ZeroShot(), Read())


def test_olora_refuses_adapters_without_factors() -> None:
    with pytest.raises(ValueError, match="OLoRA: the adapters of LocasModel are not low-rank ones"):
        adapted_run(OLoRA(), model=remembering(SPEC))


@pytest.mark.parametrize("make", [OLoRA, AdapterPerTask])
def test_new_adapters_are_refused_beside_strategies_that_need_the_same_weights(make: Any) -> None:
    rival = OLoRA() if make is AdapterPerTask else AdapterPerTask()
    beside: list[Strategy] = [EWC(strength=1.0), ILoRA(capacity=8), rival]
    for other in beside:
        with pytest.raises(ValueError, match=f"{make.__name__} trains another adapter in every task, and strategies.1"):
            adapted_run(make(), other)


@pytest.mark.parametrize("make", [OLoRA, AdapterPerTask])
def test_they_refuse_a_model_without_adapters_and_one_that_another_strategy_has_taken(make: Any) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__}: ToyModel has no adapters"):
        ToyRun([make()], Objective, "language")
    model = ours(SPEC)
    model.use_adapters(["default"], [])
    with pytest.raises(ValueError, match="needs a model of which one adapter answers and is trained"):
        adapted_run(make(), model=model)


def test_wrong_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="orthogonality, norm: must not be negative"):
        OLoRA(norm=-1.0)
