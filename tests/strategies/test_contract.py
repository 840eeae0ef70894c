"""Every strategy keeps the contract of `strategies/contract.py`, and the contract catches those that do not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from adapted_toys import ours, prompted, remembering, toy_folder

from clplat.objective import Objective
from clplat.strategies.adapter_per_task import AdapterPerTask
from clplat.strategies.base import Strategy
from clplat.strategies.contract import (
    Make,
    check_composition,
    check_disabled,
    check_randomness,
    check_resume,
    check_storage,
    check_strategy,
)
from clplat.strategies.contrastive import SCR
from clplat.strategies.distillation import DER, DERpp, LwF
from clplat.strategies.er_ace import ERACE
from clplat.strategies.fast_slow import FastSlow
from clplat.strategies.icarl import iCaRL
from clplat.strategies.ilora import ILoRA
from clplat.strategies.interpolated_weights import InterpolatedWeights
from clplat.strategies.la_maml import LaMAML
from clplat.strategies.locas import AfterTask, Locas
from clplat.strategies.olora import OLoRA
from clplat.strategies.path_integral import SI, RWalk
from clplat.strategies.projection import AGEM, GEM
from clplat.strategies.prompts import ProgressivePrompts, PromptPool
from clplat.strategies.prototype_answers import PrototypeAnswers
from clplat.strategies.reference import Cumulative, Joint, Naive
from clplat.strategies.regularization import EWC, MAS, OnlineEWC
from clplat.strategies.replay import ExperienceReplay, GDumb
from clplat.strategies.toy_run import STEPS, Kind, ToyRun
from clplat.streams.batch import Batch
from clplat.streams.episodes import EpisodeShape

CASES: dict[str, tuple[Make, dict[str, float] | None]] = {
    "Naive": (Naive, {}),
    "Joint": (Joint, None),
    "Cumulative": (Cumulative, None),
    "ER reservoir": (lambda: ExperienceReplay(capacity=7), {"ratio": 0.0}),
    "ER ring": (lambda: ExperienceReplay(capacity=7, policy="ring", from_task=1), {"ratio": 0.0}),
    "ER class_balanced": (lambda: ExperienceReplay(capacity=7, policy="class_balanced"), {"weight": 0.0}),
    "ER mean of all": (lambda: ExperienceReplay(capacity=7, mean="all"), {"ratio": 0.0}),
    "ER at task ends": (lambda: ExperienceReplay(capacity=7, fill="task_end"), {"ratio": 0.0}),
    "ER in rounds": (lambda: ExperienceReplay(capacity=7, draw="rounds"), {"ratio": 0.0}),
    "ER ring and reservoir": (
        lambda: ExperienceReplay(capacity=7, policy="ring_reservoir", ring_share=0.4, from_task=1),
        {"ratio": 0.0},
    ),
    "ER of the past": (
        lambda: ExperienceReplay(capacity_bytes=500, policy="ring_reservoir", draw_from="past"),
        {"weight": 0.0},
    ),
    "DER++ ring": (lambda: DERpp(capacity=7, top_logits=3, policy="ring_reservoir", draw_from="past"), {"weight": 0.0}),
    "interpolated": (InterpolatedWeights, {}),
    "interpolated adopted": (lambda: InterpolatedWeights(share=0.5, adopt=True), {"share": 1.0}),
    "ER bytes": (lambda: ExperienceReplay(capacity_bytes=500, ratio=2.0), {"ratio": 0.0}),
    "GDumb": (lambda: GDumb(capacity=7), None),
    "GDumb bytes": (lambda: GDumb(capacity_bytes=500), None),
    "DER++": (lambda: DERpp(capacity=7), {"ratio": 0.0}),
    "DER++ bytes": (lambda: DERpp(capacity_bytes=500, ratio=2.0, from_task=1), {"alpha": 0.0, "beta": 0.0}),
    "DER++ top": (lambda: DERpp(capacity=7, top_logits=3), {"ratio": 0.0}),
    "DER": (lambda: DER(capacity=7, ratio=0.5), {"ratio": 0.0}),
    "DER top": (lambda: DER(capacity=7, top_logits=3), {"alpha": 0.0}),
    "ER-ACE": (lambda: ERACE(capacity=7), {"ratio": 0.0}),
    "ER-ACE first": (lambda: ERACE(capacity_bytes=500, from_task=1), {"weight": 0.0}),
    "SCR": (lambda: SCR(capacity=7), None),
    "SCR one view": (lambda: SCR(capacity_bytes=500, ratio=2.0, second_view=False, from_task=2), None),
    "iCaRL": (lambda: iCaRL(capacity=7), None),
    "iCaRL bytes": (lambda: iCaRL(capacity_bytes=500, ratio=0.5, weight=2.0), None),
    "prototypes": (lambda: PrototypeAnswers(per_class=3), None),
    "FastSlow": (
        lambda: FastSlow(memory_per_class=4, strength=5.0, episodes=3, episode=EpisodeShape(ways=2, queries=2)),
        {"ratio": 0.0, "strength": 0.0, "distillation": 0.0, "to_fast": 0.0},
    ),
    "FastSlow single": (lambda: FastSlow(episodes=3, single=True, answers="head", decay=0.5), None),
    "La-MAML": (lambda: LaMAML(capacity=7), None),
    "La-MAML second": (lambda: LaMAML(capacity_bytes=500, second_order=True, inner_steps=2, from_task=2), None),
    "GEM": (lambda: GEM(patterns_per_task=4), {"patterns_per_task": 0}),
    "EWC": (lambda: EWC(strength=5.0, fisher_samples=6, fisher_batch_size=4), {"strength": 0.0}),
    "EWC batch": (lambda: EWC(strength=5.0, fisher="batch", labels="observed"), {"strength": 0.0}),
    "EWC predicted": (lambda: EWC(strength=5.0, labels="predicted", fisher_batch_size=4), {"strength": 0.0}),
    "OnlineEWC": (lambda: OnlineEWC(strength=5.0, decay=0.5, fisher_batch_size=1), {"strength": 0.0}),
    "MAS": (lambda: MAS(strength=0.1, samples=6, batch_size=4), {"strength": 0.0}),
    "MAS batch": (lambda: MAS(strength=0.1, gradients="batch", average=0.5), {"strength": 0.0}),
    "SI": (lambda: SI(strength=0.5), {"strength": 0.0}),
    "SI avalanche": (lambda: SI(strength=5.0, damping=1e-3, definition="avalanche"), {"strength": 0.0}),
    "RWalk": (lambda: RWalk(strength=0.5, interval=3), {"strength": 0.0}),
    "LwF": (lambda: LwF(alpha=0.5), {"alpha": 0.0}),
    "LwF share": (lambda: LwF(alpha=[0.0, 0.5, 0.7], loss_weight="share"), None),
    "LwF replayed": (lambda: LwF(alpha=0.5, rows="replayed"), {"alpha": 0.0}),
    "LwF seen": (lambda: LwF(alpha=0.5, softmax="seen"), {"alpha": 0.0}),
}


NO_LANGUAGE = {
    "DER++": r"DERpp\.top_logits: 7 logits would be stored for every token",
    "DER++ bytes": r"DERpp\.top_logits",
    "DER": r"DER\.top_logits: 7 logits would be stored for every token",
    "ER-ACE": "ERACE: the tasks of this stream have no classes",
    "ER-ACE first": "ERACE: the tasks of this stream have no classes",
    "SCR": "SCR: the tasks of this stream have no classes",
    "SCR one view": "SCR: the tasks of this stream have no classes",
    "iCaRL": "iCaRL: the tasks of this stream have no classes",
    "iCaRL bytes": "iCaRL: the tasks of this stream have no classes",
    "LwF seen": r"LwF\.softmax: seen is for classes in the class scenario",
    "prototypes": "PrototypeAnswers: the tasks of this stream have no classes",
    "FastSlow": "FastSlow: the tasks of this stream have no classes",
    "FastSlow single": "FastSlow: the tasks of this stream have no classes",
}
"""What is refused on language, and with which words."""


@pytest.mark.parametrize("kind", ["classify", "language"])
@pytest.mark.parametrize("name", CASES)
def test_every_strategy_keeps_the_contract(name: str, kind: Kind) -> None:
    make, off = CASES[name]
    if kind == "language" and name in NO_LANGUAGE:
        with pytest.raises(ValueError, match=NO_LANGUAGE[name]):
            ToyRun([make()], Objective, kind)
    else:
        check_strategy(make, Objective, off=off, kind=kind)


ON_ADAPTERS: dict[str, Make] = {
    "I-LoRA": lambda: ILoRA(capacity=7),
    "I-LoRA as meant": lambda: ILoRA(arm="code_intent", capacity_bytes=500, capacity=None, exclude_current=True),
    "I-LoRA as it runs": lambda: ILoRA(arm="code_inert_ema", capacity=7, ratio=0.5, from_task=1),
    "I-LoRA logits": lambda: ILoRA(capacity=7, space="logits", target="better_ce", boundary="reset_fast", decay=0.5),
    "O-LoRA": lambda: OLoRA(norm=0.1),
    "adapter per task": AdapterPerTask,
    "GEM": lambda: GEM(patterns_per_task=4),
    "A-GEM": lambda: AGEM(patterns_per_task=4, sample_size=4),
    "EWC": lambda: EWC(strength=5.0, fisher_samples=6, fisher_batch_size=4),
    "LwF": lambda: LwF(alpha=0.5),
}
ON_PROMPTS: dict[str, Make] = {
    "progressive prompts": lambda: ProgressivePrompts(length=2),
    "prompt pool": lambda: PromptPool(size=4, length=2, top_k=2, query_tokens=3),
}
ON_MEMORIES: dict[str, Make] = {
    f"Locas {after}": lambda after=after: Locas(after_task=after) for after in get_args(AfterTask)
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", ON_PROMPTS)
def test_strategies_of_prompts_keep_the_contract(name: str, llama: Path) -> None:
    make, model = ON_PROMPTS[name], partial(prompted, llama)
    check_strategy(make, Objective, off=None, kind="language", model=model)
    check_composition(make, Objective, "language", model)


@pytest.mark.parametrize("name", ON_MEMORIES)
def test_strategies_of_memories_keep_the_contract(name: str) -> None:
    check_strategy(ON_MEMORIES[name], Objective, off=None, kind="language", model=remembering)
    check_composition(ON_MEMORIES[name], Objective, "language", remembering)


@pytest.mark.parametrize("make", [OLoRA, AdapterPerTask])
def test_a_model_held_to_what_it_was_resumes_although_adapters_came_since(make: Make) -> None:
    alone = ToyRun([make(), LwF(alpha=0.5)], Objective, "language", model=ours).train()
    for stop in (STEPS + 2, 2 * STEPS + 2):
        saved = ToyRun([make(), LwF(alpha=0.5)], Objective, "language", model=ours).train(stop).saved()
        resumed = ToyRun([make(), LwF(alpha=0.5)], Objective, "language", model=ours).load(saved)
        assert resumed.saved() == saved and resumed.train().saved() == alone.saved()


@pytest.mark.parametrize("name", ON_ADAPTERS)
def test_strategies_on_adapters_keep_the_contract(name: str) -> None:
    make = ON_ADAPTERS[name]
    check_strategy(make, Objective, off=None, kind="language", model=ours)
    if make().overrides("penalty") or make().replays:
        check_composition(make, Objective, "language", ours)


@pytest.mark.parametrize("name", ["GDumb", "SCR", "SCR one view", "iCaRL", "iCaRL bytes", "La-MAML", "FastSlow single"])
def test_what_cannot_be_turned_off_composes_with_replay_all_the_same(name: str) -> None:
    check_composition(CASES[name][0], Objective)


class _Forgets(Strategy):
    """Counts steps and does not save the count."""

    def __init__(self) -> None:
        self.count = 0

    def gradient(self) -> None:
        self.count += 1
        for parameter in self.context.architecture.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1 / self.count)


class _DrawsGlobally(Strategy):
    def batch(self, batch: Batch) -> Batch:
        torch.rand(1)
        return batch


class _HidesRows(Strategy):
    """Stores rows and says that it stores none."""

    def setup(self, context) -> None:
        super().setup(context)
        self.kept = context.tasks[0].train.batch(torch.arange(2)).inputs

    def state_dict(self):
        return {"rows": {"inputs": self.kept}}


class _Displaces(Strategy):
    def batch(self, batch: Batch) -> Batch:
        return batch.rows(torch.arange(len(batch)).flip(0))


@pytest.mark.parametrize(
    ("make", "check"),
    [(_Forgets, check_resume), (_DrawsGlobally, check_randomness), (_HidesRows, check_storage),
     (_Displaces, check_composition)],
)  # fmt: skip
def test_the_contract_catches_what_it_is_there_for(make: Make, check) -> None:
    with pytest.raises(AssertionError):
        check(make, Objective)


def test_a_strategy_that_is_not_off_is_caught() -> None:
    with pytest.raises(AssertionError, match="still"):
        check_disabled(lambda: ExperienceReplay(capacity=6), Objective, {"weight": 0.5})


def test_joint_takes_the_steps_of_all_tasks_and_reads_all_their_rows() -> None:
    joint = Joint()
    run = ToyRun([joint], Objective)
    (task,) = run.path
    assert list(joint.budget_tasks(task)) == list(run.context.tasks)
    assert len(joint.train_data(task, ())) == sum(len(each.train) for each in run.context.tasks)


def test_cumulative_reads_the_past_and_the_present_but_not_the_future() -> None:
    run = ToyRun([Cumulative()], Objective)
    data = run.strategies[0].train_data(run.path[1], run.path[:1])
    assert data.batch(torch.arange(len(data))).task.unique().tolist() == [0, 1]
