"""I-LoRA: without its consistency loss it is replay, slow weights follow as they should, every view is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_toys import adapted_run, ours, theirs, toy_folder

from clplat.architectures.adapters import AdapterHost, backbone_checksum
from clplat.architectures.base import Output
from clplat.objective import Objective
from clplat.strategies.contract import check_composition
from clplat.strategies.ilora import ILoRA
from clplat.strategies.ilora_arms import ARMS
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import STEPS, ToyRun, toy_stream
from clplat.streams.batch import REPLAY

SPEC = toy_stream("language")[0]


@pytest.fixture(params=["ours", "peft"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> AdapterHost:
    return ours(SPEC) if request.param == "ours" else theirs(toy_folder(tmp_path), SPEC)


def made(**options: Any) -> ILoRA:
    return ILoRA(**{"capacity": 8} | options)


def copies(model: AdapterHost, adapter: str) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.adapter_parameters(adapter).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_without_consistency_fast_weights_are_those_of_replay_whatever_the_decay(decay: float) -> None:
    replay, found = (
        adapted_run(strategy, model=ours(SPEC, dropout=0.1))
        for strategy in (ExperienceReplay(capacity=8, mean="all"), made(consistency=0.0, decay=decay))
    )
    for run in (replay, found):
        torch.manual_seed(3)
        run.architecture.train()
        run.train()
    assert same(copies(found.architecture, "default"), copies(replay.architecture, "default"))
    drawn = adapted_run(made(consistency=1.0, decay=decay)).train()
    assert decay == 0.0 or not same(copies(drawn.architecture, "default"), copies(replay.architecture, "default"))


def test_slow_weights_follow_once_a_step_by_the_decay(model: AdapterHost) -> None:
    run = adapted_run(made(decay=0.25), model=model)
    expected = copies(model, "default")
    assert same(copies(model, "slow"), expected)
    for step in range(1, run.length + 1):
        run.train(step)
        fast = copies(model, "default")
        expected = {name: 0.25 * expected[name] + 0.75 * fast[name] for name in fast}
        torch.testing.assert_close(copies(model, "slow"), expected)
    assert all(p.grad is None and not p.requires_grad for p in model.adapter_parameters("slow").values())
    assert all(p.grad is not None for p in model.adapter_parameters("default").values())
    assert backbone_checksum(model.backbone) == model.checksum


def test_all_slow_tensors_move_and_none_of_them_at_decay_1(model: AdapterHost) -> None:
    run = adapted_run(made(decay=0.9), model=model)
    before = copies(model, "slow")
    run.train()
    after = copies(model, "slow")
    assert len(after) >= 8 and not any(torch.equal(after[name], before[name]) for name in after)


def test_decay_0_makes_slow_weights_the_fast_ones_and_decay_1_leaves_them_at_the_first_tasks_start() -> None:
    run = adapted_run(made(decay=0.0))
    for step in range(1, run.length + 1):
        run.train(step)
        assert same(copies(run.architecture, "slow"), copies(run.architecture, "default"))
    assert run.strategies[0].signals()["slow_distance"] == 0
    run = adapted_run(made(arm="code_inert_ema"))
    start = copies(run.architecture, "default")
    run.train()
    assert same(copies(run.architecture, "slow"), start) and run.strategies[0].signals()["slow_distance"] > 0
    assert not any(start[name].any() for name in start if name.endswith("lora_B"))


@pytest.mark.parametrize("target", ["slow", "elementwise_max", "better_ce"])
@pytest.mark.parametrize("space", ["hidden", "logits"])
@pytest.mark.parametrize("layers", ["all", "last", [1, -1]])
def test_held_to_equal_slow_weights_the_loss_is_0_and_to_others_it_is_not(target: Any, space: Any, layers: Any) -> None:
    strategy = made(decay=1.0, target=target, space=space, layers=layers)
    run = adapted_run(strategy).train(STEPS + 1)
    output = run.architecture(run.mixed, None, strategy.hidden)
    wanted = strategy.penalty(output, run.mixed)
    strategy.pairs.slow_from_fast()
    assert wanted is not None and strategy.penalty(output, run.mixed) == 0
    # Slow weights of the first task's start predict its rows worse, so that nothing is held to them there.
    assert wanted > 0 or target == "better_ce"


def test_the_loss_is_that_of_the_equation_on_replayed_rows_alone(model: AdapterHost) -> None:
    strategy = made(arm="code_intent", decay=0.9, consistency=2.5)
    run = adapted_run(strategy, model=model).train(STEPS + 2)
    assert run.mixed.origin is not None
    rows = run.mixed.rows(run.mixed.origin == REPLAY)
    assert len(rows) == 4
    with torch.no_grad():
        fast = model(rows, None, "all").hidden
        with model.answering("slow"):
            slow = model(rows, None, "all").hidden
    expected = 2.5 * (torch.maximum(fast, slow) - fast).double().square().mean()
    found = strategy.penalty(model(run.mixed, None, "all"), run.mixed)
    assert found is not None and float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert model.active == model.trained == ("default",)


def test_nothing_is_held_or_replayed_in_the_first_task() -> None:
    strategy = made()
    run = adapted_run(strategy)
    for step in range(1, STEPS + 1):
        run.train(step)
        assert len(run.mixed) == 4
        assert strategy.penalty(Output(logits=torch.zeros(1)), run.mixed) is None


@pytest.mark.parametrize(("boundary", "slow", "fast"), [("keep", "slow", "fast"), ("reset_slow", "fast", "fast"),
                                                        ("reset_fast", "slow", "slow")])  # fmt: skip
def test_at_a_boundary_both_go_on_or_one_becomes_the_other(boundary: Any, slow: str, fast: str) -> None:
    strategy = made(decay=0.9, boundary=boundary)
    run = adapted_run(strategy).train(STEPS)
    before = {"fast": copies(run.architecture, "default"), "slow": copies(run.architecture, "slow")}
    assert not same(before["fast"], before["slow"])
    run.context.past = run.path[:1]
    strategy.task_start(run.path[1])
    assert same(copies(run.architecture, "slow"), before[slow])
    assert same(copies(run.architecture, "default"), before[fast])


@pytest.mark.parametrize("answer_with", ["fast", "slow", "interpolated"])
def test_one_run_answers_in_three_ways_of_which_one_is_the_default(model: AdapterHost, answer_with: Any) -> None:
    strategy = made(decay=0.9, answer_with=answer_with, slow_share=0.25)
    run = adapted_run(strategy, model=model).train()
    batch, states = run.path[0].train.batch(torch.arange(3)), copies(model, "default")
    between = {name: 0.75 * states[name] + 0.25 * tensor for name, tensor in copies(model, "slow").items()}
    weights = {"fast": states, "slow": copies(model, "slow"), "interpolated": between}
    assert set(strategy.views()) == {"fast", "slow", "interpolated", "default"} - {answer_with}
    for name, view in strategy.views().items():
        with torch.no_grad():
            with view():
                found = model(batch).logits
            for tensor, wanted in zip(
                model.adapter_parameters("default").values(),
                weights[answer_with if name == "default" else name].values(),
            ):
                tensor.copy_(wanted)
            torch.testing.assert_close(found, model(batch).logits)
            for tensor, own in zip(model.adapter_parameters("default").values(), states.values()):
                tensor.copy_(own)
    assert model.active == ("default",) and same(copies(model, "default"), states)


def test_exclude_current_replays_earlier_tasks_alone() -> None:
    for exclude, expected in ((True, {0}), (False, {0, 1})):
        run, tasks = adapted_run(made(exclude_current=exclude, capacity=12, ratio=2.0)), set()
        for step in range(STEPS + 1, 2 * STEPS + 1):
            run.train(step)
            assert run.mixed.origin is not None and run.mixed.task is not None
            tasks |= set(run.mixed.task[run.mixed.origin == REPLAY].tolist())
        assert tasks == expected


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_adds_what_it_adds_beside_other_replay(arm: Any) -> None:
    check_composition(lambda: made(arm=arm), Objective, "language", ours)


def test_an_option_beside_an_arm_changes_that_option_alone() -> None:
    options = made(arm="code_intent", decay=0.99, layers="last").options
    assert (options.decay, options.layers, options.target) == (0.99, "last", "elementwise_max")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arm": "code"}, "arm: must be one of paper, code_intent, code_inert_ema, got 'code'"),
        ({"decay": 1.5}, "decay: must lie between 0 and 1"),
        ({"consistency": -1.0}, "consistency: must not be negative"),
        ({"slow_share": 2.0}, "slow_share: must lie between 0 and 1"),
        ({"layers": []}, "layers: must be all, last, or a list of numbers"),
        ({"target": "max"}, "target: must be one of slow, elementwise_max, better_ce, got 'max'"),
        ({"layers": [7]}, r"ILoRA.layers: \[7\] are not all there; Adapted has 3"),
        ({"capacity": 500}, "ILoRA.capacity: 500 rows, more than the stream's 36 training rows"),
    ],
)
def test_wrong_options_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted_run(made(**options))


def test_a_model_without_adapters_or_hidden_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="ILoRA: ToyModel has no adapters; use Pretrained with lora, or Adapted"):
        ToyRun([made()], Objective, "language")
    with pytest.raises(ValueError, match="ILoRA: reads token rows"):
        ToyRun([made()], Objective, "classify")
    host = ours(SPEC)
    plain = host.backbone.forward
    host.backbone.forward = lambda batch, state, _: plain(batch, state)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="does not show hidden states of 'all' layers; use last, or space: logits"):
        adapted_run(made(layers="all"), model=host)
