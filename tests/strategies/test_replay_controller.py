"""The controller of replay: its law, its signals, its controls, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clplat.objective import Objective
from clplat.strategies.base import Strategy
from clplat.strategies.controllers.base import Playback
from clplat.strategies.controllers.contract import ControlledRun, check_controller
from clplat.strategies.controllers.replay_controller import OUTPUTS, ReplayController
from clplat.strategies.controllers.replay_law import ReplayLaw, RunningLaw
from clplat.strategies.distillation import DERpp
from clplat.strategies.icarl import iCaRL
from clplat.strategies.regularization import EWC
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import BATCH, STEPS, TASKS, Kind, ToyRun
from clplat.streams.batch import REPLAY

HIGH = 1.0


def law(integral: bool = True, stay_on: bool = False, rows: int = 8000, **options: Any) -> RunningLaw:
    """The law as it was reconstructed: nothing without forgetting, and rows that follow it too."""
    options = {"base_weight": 0.0, "ratio_slope": 0.25, **options}
    return ReplayLaw(**options).begun(outputs=OUTPUTS, integral=integral, rows=rows, stay_on=stay_on)


def course(running: RunningLaw, forgetting: list[float]) -> list[dict[str, float]]:
    """The outputs after every update."""
    found = []
    for value in forgetting:
        running.update(value)
        found.append(running.values())
    return found


def test_the_outputs_are_those_of_the_equations_gone_through_by_hand() -> None:
    # F̄ 0.06, 0.108; e 0.01, 0.058; I 0.01, 0.068
    first, second = course(law(base_weight=0.5), [0.3, 0.3])
    assert first["weight"] == pytest.approx(0.5 + 0.01 + 0.001)
    assert second["weight"] == pytest.approx(0.5 + 0.058 + 0.0068)
    assert second["ratio"] == pytest.approx(0.125 + 0.25 * (0.058 + 0.0068), abs=1 / 16_000)


@pytest.mark.parametrize("forgetting", [0.0, 0.02, 0.049])
@pytest.mark.parametrize("before", [0.0, HIGH])
def test_constant_forgetting_below_the_target_drives_the_weight_to_its_least(forgetting: float, before: float) -> None:
    for stay_on, least in ((False, 0.0), (True, 0.1)):
        running = law(stay_on=stay_on)
        course(running, [before] * 30)
        assert course(running, [forgetting] * 6000)[-1]["weight"] == least


def test_a_step_in_forgetting_raises_weight_and_ratio_monotonically() -> None:
    running = law()
    course(running, [0.04] * 20)
    found = course(running, [0.4] * 60)
    for knob in ("weight", "ratio"):
        values = [values[knob] for values in found]
        assert all(later >= earlier for earlier, later in zip(values, values[1:]))
        assert values[-1] > values[0] + 0.05
    strictly = [values["weight"] for values in found[:20]]
    assert all(later > earlier for earlier, later in zip(strictly, strictly[1:]))


@pytest.mark.parametrize("integral", [True, False])
@pytest.mark.parametrize("forgetting", [0.0, 0.05, 0.1, 0.6, 5.0])
@pytest.mark.parametrize("before", [0.0, 0.3, 5.0])
def test_no_output_oscillates_while_forgetting_is_constant(integral: bool, forgetting: float, before: float) -> None:
    running = law(integral)
    course(running, [before] * 40)
    found = course(running, [forgetting] * 300)
    for knob in OUTPUTS:
        moves = [later[knob] - earlier[knob] for earlier, later in zip(found, found[1:])]
        directions = [move > 0 for move in moves if abs(move) > 1e-12]
        turns = sum(one != other for one, other in zip(directions, directions[1:]))
        assert turns <= 1, f"{knob} turns {turns} times"
        assert abs(moves[-1]) < 1e-3


def test_by_default_the_weight_alone_follows_forgetting() -> None:
    running = ReplayLaw().begun(outputs=OUTPUTS, integral=True, rows=8, stay_on=False)
    found = course(running, [0.0] * 50 + [0.6] * 50)
    assert {values["ratio"] for values in found} == {0.125}
    assert found[49]["weight"] == pytest.approx(0.2, abs=1e-3) and found[-1]["weight"] > 0.7


def test_ratios_are_of_whole_rows() -> None:
    found = course(law(rows=8), [0.5] * 40)
    assert {values["ratio"] * 8 for values in found} <= {1.0, 2.0, 3.0, 4.0}


def test_after_long_saturation_the_outputs_leave_their_limit_within_ten_updates() -> None:
    running = law()
    assert course(running, [3.0] * 300)[-1] == {"weight": 2.0, "ratio": 0.5, "long_share": 0.5}
    found = course(running, [0.0] * 10)
    assert found[-1]["weight"] < 2.0 and found[-1]["ratio"] < 0.5
    course(running, [0.0] * 300)
    assert course(running, [0.5] * 10)[-1]["weight"] > 0.1


def test_the_integral_stands_still_at_a_limit_and_without_that_it_would_not() -> None:
    running, free = law(), law(max_weight=1e9, max_ratio=1e9)
    course(running, [3.0] * 100)
    course(free, [3.0] * 100)
    assert running.terms()["I"] < 4.0
    assert free.terms()["I"] == 5.0


def test_the_reservoir_gets_the_share_by_which_its_rows_are_forgotten_more() -> None:
    running = law()
    assert running.values()["long_share"] == 0.5
    for _ in range(100):
        running.split(0.1, 0.3)
    assert running.values()["long_share"] == pytest.approx(0.75)
    for _ in range(100):
        running.split(None, 0.0)
    assert running.values()["long_share"] == pytest.approx(0.1), "the ring alone is forgotten"


def controlled(replay: dict[str, Any] | None = None, **options: Any) -> dict[str, Strategy]:
    ring = {"capacity": 12, "policy": "ring_reservoir", "ring_share": 0.4, "from_task": 1}
    return {
        "controller": ReplayController(**{"every": 2, **options}),
        "replay": ExperienceReplay(**{**ring, **(replay or {})}),
    }


def dark(**options: Any) -> dict[str, Strategy]:
    controller = ReplayController(strategy="dark", every=2, **options)
    return {"dark": DERpp(capacity=12, top_logits=3), "controller": controller}


QUICK = ReplayLaw(smoothing=0.0, base_ratio=0.5, base_weight=0.3, ratio_slope=0.25)
MAKES = {
    "buffer": lambda: controlled(law=QUICK),
    "proportional": lambda: controlled(law=QUICK, mode="p"),
    "probe": lambda: controlled(law=QUICK, signal="probe"),
    "fixed": lambda: controlled(mode="fixed", mean={"ratio": 0.3, "weight": 0.7, "long_share": 0.6}),
    "random": lambda: controlled(mode="random", mean={"ratio": 0.3, "weight": 0.7, "long_share": 0.6}),
    "reservoir": lambda: controlled({"policy": "reservoir", "from_task": 2}, law=QUICK),
    "task ends": lambda: controlled({"fill": "task_end", "draw_from": "past"}, law=QUICK),
    "DER++": lambda: dark(law=QUICK),
}


@pytest.mark.parametrize("kind", ["classify", "language"])
@pytest.mark.parametrize("name", MAKES)
def test_every_mode_and_signal_keeps_the_contract(name: str, kind: Kind) -> None:
    check_controller(MAKES[name], Objective, kind)


def test_while_nothing_can_be_replayed_weight_and_ratio_are_zero() -> None:
    run = ControlledRun(controlled({"fill": "task_end"}), Objective)
    run.train(STEPS)
    values = {(kind, step, knob): value for kind, step, _, knob, value in run.decisions}
    assert values == {(kind, step, knob): 0.0 for kind, step in (("start", 0), ("step", 2), ("step", 4))
                      for knob in ("weight", "ratio")}  # fmt: skip
    run.train(STEPS + 1)
    assert all(value > 0 for _, step, _, _, value in run.decisions if step == STEPS)


def test_the_buffer_signal_is_the_mean_rise_of_what_was_replayed_since_the_last_decision() -> None:
    run = ControlledRun(controlled(law=QUICK), Objective, "language")
    replay, controller = run.named["replay"], run.named["controller"]
    assert isinstance(replay, ExperienceReplay) and isinstance(controller, ReplayController)
    found, (rise, rows) = [], (0.0, 0.0)
    for step in range(2, run.length + 1, 2):
        run.train(step)
        now = replay.buffer.rises.sum(0).tolist()
        if now[1] > rows:
            found.append(controller.measurements()["F"])
            assert found[-1] == pytest.approx((now[0] - rise) / (now[1] - rows))
        rise, rows = now
    assert len(found) > 5 and max(found) > 0


def test_the_probe_signal_is_the_mean_rise_of_earlier_tasks_above_their_lowest_loss() -> None:
    losses = {"task0": iter([3.0] * 2 + [1.0] + [1.5, 1.2] + [1.0] * 90), "task1": iter([4.0, 2.0, 2.5] + [2.5] * 90)}
    run = ControlledRun(controlled(signal="probe"), Objective, probe=lambda name: next(losses.get(name, iter([9.0]))))
    controller = run.named["controller"]
    run.train(STEPS)
    assert "F" not in controller.measurements(), "in the first task there is no earlier one"
    run.train(STEPS + 1)  # task0 1.5
    assert controller.measurements()["F"] == pytest.approx(0.5)
    run.train(STEPS + 3)
    assert controller.measurements()["F"] == pytest.approx(0.2)
    run.train(2 * STEPS + 2)  # task0 at its lowest, task1 at 2.5 with 2.0 at its own end
    assert controller.measurements()["F"] == pytest.approx(0.25)


def test_decisions_take_effect_and_replayed_rows_follow_the_ratio() -> None:
    run = ControlledRun(controlled(mode="fixed", mean={"ratio": 0.5, "weight": 0.7}), Objective)
    run.train(4)
    assert int((run.mixed.origin == REPLAY).sum()) == BATCH // 2
    assert run.mixed.weight[run.mixed.origin == REPLAY].unique().tolist() == pytest.approx([0.7])


def test_the_least_ratio_replays_one_row_also_where_a_strategy_draws_twice() -> None:
    run = ControlledRun(dark(law=ReplayLaw(base_ratio=0.0, ratio_slope=0.0)), Objective)
    run.train(STEPS + 3)
    assert len(run.mixed) - BATCH == 1


@pytest.mark.parametrize("mode", ["fixed", "random"])
def test_the_controls_hold_their_mean(mode: str) -> None:
    run = ControlledRun(controlled(every=1, mode=mode, mean={"ratio": 0.3, "weight": 0.7}), Objective).train()
    for knob, mean, near in (("ratio", 0.3, 0.25 / 3), ("weight", 0.7, 0.25)):
        values = [v for kind, _, _, name, v in run.decisions if kind == "step" and name == knob]
        assert sum(values) / len(values) == pytest.approx(mean, abs=near if mode == "random" else 0.02)
        if knob == "weight" and mode == "random":
            assert len(set(values)) == len(values)


def written(run: ControlledRun, path: Path) -> str:
    rows = [dict(zip(("kind", "step", "strategy", "knob", "value"), row)) for row in run.decisions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["buffer", "random"])
def test_played_back_decisions_give_the_same_run_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ControlledRun(MAKES[name](), Objective).train()
    written(first, tmp_path / "decisions.jsonl")
    monkeypatch.setenv("FIRST_RUN", str(tmp_path))
    path = "${FIRST_RUN}/decisions.jsonl"
    replay = MAKES[name]()["replay"]
    second = ControlledRun({"replay": replay, "back": Playback(decisions=path)}, Objective).train()
    third = ControlledRun(controlled(mode="playback", decisions=path), Objective).train()
    for run in (second, third):
        assert run.decisions == first.decisions
        for key, tensor in first.weights().items():
            assert (tensor == run.weights()[key]).all()
    assert "F" in third.named["controller"].measurements(), "what the law would have seen is still written down"


def test_fixed_at_the_mean_of_a_recorded_run_replays_as_many_rows(tmp_path: Path) -> None:
    def replayed(run: ControlledRun) -> int:
        total = 0
        for step in range(1, run.length + 1):
            run.train(step)
            total += len(run.mixed) - BATCH
        return total

    quick = ReplayLaw(smoothing=0.0, base_ratio=0.4, ratio_slope=2.0, gain=5.0, target=0.0)
    first = ControlledRun(controlled(law=quick, every=1), Objective)
    rows = replayed(first)
    path = written(first, tmp_path / "decisions.jsonl")
    assert rows > TASKS * STEPS, "more than the least"
    assert abs(replayed(ControlledRun(controlled(every=1, mode="fixed", decisions=path), Objective)) - rows) <= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: controlled(strategy="reply"), "strategy: 'reply' is no replay of this run; there are replay"),
        (lambda: {"a": EWC(strength=1.0), "c": ReplayController(strategy="a")}, "'a' is no replay of this run.* none"),
        (lambda: controlled(mode="off"), "mode: must be pi, p, fixed, random or playback, got 'off'"),
        (lambda: controlled(signal="x"), "signal: must be buffer or probe"),
        (lambda: controlled(every=0), "every, probe_rows: must be positive"),
        (lambda: controlled(mode="fixed"), "fixed needs a mean, or the decisions"),
        (lambda: controlled(mode="fixed", mean={"lambda": 1.0}), "mean: there is no knob 'lambda'"),
        (lambda: controlled(mode="random", mean={"weight": 50.0}), "mean.weight: .* 2 .law.max_weight., got 50"),
        (lambda: controlled(mode="fixed", mean={"ratio": 9.0}), "mean.ratio: .* 0.5 .law.max_ratio., got 9"),
        (lambda: controlled(mode="playback"), "playback needs decisions"),
        (lambda: controlled(mode="playback", decisions="nowhere"), "decisions: nowhere cannot be read"),
        (lambda: controlled(mean={"ratio": 1.0}), "pi decides for itself"),
        (lambda: controlled(law=ReplayLaw(gain=-1.0)), "law.gain: must not be negative"),
        (lambda: controlled(law=ReplayLaw(smoothing=1.0)), "law.smoothing: must lie between 0 and 1"),
        (lambda: controlled(law=ReplayLaw(min_weight=3.0)), "law.min_weight, max_weight: must rise from 0"),
        (lambda: {"i": iCaRL(capacity=6), "c": ReplayController(strategy="i")}, "iCaRL does not measure what"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_before_training(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlledRun(make(), Objective)


def test_without_a_controller_nothing_is_tracked() -> None:
    run = ToyRun([ExperienceReplay(capacity=12, from_task=1)], Objective).train()
    assert not run.mixed.extra
