"""No step of a penalty asks the device for a number: on a GPU each such question would make the step wait."""

from __future__ import annotations

import pytest
import torch
from adapted_toys import ours
from no_questions import NoQuestions
from torch import Tensor

from clplat.architectures.base import StepOutcome
from clplat.objective import Objective
from clplat.strategies.base import Strategy
from clplat.strategies.contract import Make
from clplat.strategies.distillation import LwF
from clplat.strategies.fast_slow import FastSlow
from clplat.strategies.ilora import ILoRA
from clplat.strategies.ilora_arms import ARMS, Arm
from clplat.strategies.olora import OLoRA
from clplat.strategies.path_integral import SI, RWalk
from clplat.strategies.regularization import EWC, MAS
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import STEPS, Kind, ToyRun
from clplat.streams.batch import CURRENT, REPLAY, Batch

PENALTIES: dict[str, Make] = {
    "EWC": lambda: EWC(strength=1.0),
    "MAS": lambda: MAS(strength=0.1),
    "SI": lambda: SI(strength=1.0),
    "SI avalanche": lambda: SI(strength=1.0, definition="avalanche"),
    "RWalk": lambda: RWalk(strength=1.0, interval=2),
    "LwF": lambda: LwF(),
}


class MixesIn(Strategy):
    """Two rows of the first task beside the current ones."""

    def batch(self, batch: Batch) -> Batch:
        others = self.context.tasks[0].train.batch(torch.arange(2)).with_origin(REPLAY)
        return batch.with_origin(CURRENT).joined(others)


class Asks(Strategy):
    def gradient(self) -> None:
        if float(next(self.context.architecture.parameters()).grad.sum()) > 0:
            next(self.context.architecture.parameters()).grad.zero_()


@pytest.mark.parametrize("kind", ["classify", "language"])
@pytest.mark.parametrize("name", PENALTIES)
def test_no_step_of_a_penalty_waits_for_the_device(name: str, kind: Kind) -> None:
    run = ToyRun([MixesIn(), PENALTIES[name]()], Objective, kind).train(2 * STEPS + 1)
    with NoQuestions():
        run.train(3 * STEPS - 1)


def test_no_step_of_fast_slow_waits_for_the_device() -> None:
    run = ToyRun([FastSlow(episodes=2)], Objective).train(2 * STEPS + 1)
    with NoQuestions():
        run.train(3 * STEPS - 1)
    assert len(run.mixed) > len(run.current), "the steps must have replayed rows"


def test_no_step_of_olora_waits_for_the_device() -> None:
    run = ToyRun([OLoRA(norm=0.1)], Objective, "language", model=ours).train(2 * STEPS + 1)
    with NoQuestions():
        run.train(3 * STEPS - 1)


@pytest.mark.parametrize("arm", ARMS)
def test_slow_weights_are_followed_and_answer_without_waiting_for_the_device(arm: Arm) -> None:
    strategy = ILoRA(capacity=12, arm=arm)
    run = ToyRun([strategy], Objective, "language", model=ours).train(STEPS + 2)
    output = run.architecture(run.mixed, None, strategy.hidden)
    # Not the whole step: which rows a reservoir keeps is settled on the CPU, where asking costs nothing.
    with NoQuestions():
        assert strategy.penalty(output, run.mixed) is not None
        strategy.pairs.update(strategy.options.decay)


def test_what_replayed_rows_cost_is_noted_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    replay, original = ExperienceReplay(capacity=12, policy="ring_reservoir"), ExperienceReplay._losses
    replay.track_losses("replay")
    run = ToyRun([MixesIn(), replay], Objective, "language").train(STEPS + 1)

    def watched(self: ExperienceReplay, outcome: StepOutcome) -> Tensor:
        with NoQuestions():
            return original(self, outcome)

    monkeypatch.setattr(ExperienceReplay, "_losses", watched)
    before = replay.buffer.rises.sum(0)[1].item()
    run.train(2 * STEPS)
    assert replay.buffer.rises.sum(0)[1].item() > before


def test_a_strategy_that_asks_is_caught() -> None:
    run = ToyRun([Asks()], Objective).train(1)
    with NoQuestions(), pytest.raises(AssertionError, match="waits for the device"):
        run.train(2)
