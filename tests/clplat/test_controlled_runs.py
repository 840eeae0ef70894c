"""Controllers in whole runs: told what they ask for, written down, played back, resumed, and no part of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interruptions import assert_resumes_as_if_never_stopped
from studies import assert_same, everything, run_folder, study

from clplat.checkpoint import Checkpoints
from clplat.config import save
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import read, table
from clplat.study import preflight
from clplat.study_file import expand, load_study

RING = {"capacity": 40, "policy": "ring_reservoir", "from_task": 1}
LAW = {"smoothing": 0.0, "base_weight": 0.5, "target": 0.01}


def controlled(replay: dict[str, Any] = RING, **options: Any) -> dict[str, Any]:
    options = {"every": 5, "law": LAW} | options
    return study(
        strategies={
            "controller": {"class_path": "ReplayController", "init_args": options},
            "replay": {"class_path": "ExperienceReplay", "init_args": replay},
        },
        training__accumulate=2,
    )


def executed(folder: Path, data: dict[str, Any], name: str) -> Path:
    path = run_folder(folder, data, name)
    outcome = execute(path)
    assert outcome.status == "FINISHED", outcome.reason
    return path


@pytest.mark.parametrize("signal", ["buffer", "probe"])
def test_a_controlled_run_stopped_inside_its_second_task_and_resumed_equals_the_uninterrupted_one(
    signal: str, tmp_path: Path
) -> None:
    assert_resumes_as_if_never_stopped(controlled(signal=signal), step=17, folder=tmp_path)


@pytest.mark.parametrize("player", ["Playback", "ReplayController"])
def test_decisions_at_steps_are_written_down_with_their_terms_and_played_back_bit_for_bit(
    player: str, tmp_path: Path
) -> None:
    first = executed(tmp_path, controlled(signal="probe"), "first")
    entries = list(read(first))
    decided = [(e["event"], e["step"], e["knob"]) for e in entries if e["kind"] == "decision"]
    # The first task begins with an empty memory; later ones with what the last decision was.
    assert decided[:4] == [("start", 0, "weight"), ("start", 0, "ratio"), ("step", 5, "weight"), ("step", 5, "ratio")]
    assert [step for event, step, knob in decided if event == "step" and knob == "ratio"] == [5, 10, 15, 20, 25, 30, 35]
    terms = {key for e in entries if e["kind"] == "metric" for key in e["values"] if key.startswith("controller/")}
    assert {f"controller/controller/{name}" for name in ("F", "F_mean", "e", "I", "u", "ratio", "weight")} <= terms
    data = controlled(signal="probe", mode="playback", decisions=str(first / "artifacts" / "decisions.jsonl"))
    if player == "Playback":
        data["strategies"]["controller"] = {
            "class_path": "Playback", "init_args": {"decisions": str(first / "artifacts" / "decisions.jsonl")}
        }  # fmt: skip
    second = executed(tmp_path, data, "second")
    assert str(table(first).to_rows()) == str(table(second).to_rows())
    one, other = (Checkpoints(folder, every_seconds=0).load() for folder in (first, second))
    assert one is not None and other is not None
    assert_same(one["architecture"], other["architecture"])


def test_what_a_controller_measures_touches_neither_weights_nor_random_sources(tmp_path: Path) -> None:
    held = {"mode": "fixed", "mean": {"ratio": 0.5, "weight": 1.0}}
    replay = {"capacity": 40, "ratio": 0.5}
    probing = executed(tmp_path, controlled(replay, signal="probe", **held), "probing")
    tracking = executed(tmp_path, controlled(replay, signal="buffer", **held), "tracking")
    data = controlled(replay)
    del data["strategies"]["controller"]
    plain = executed(tmp_path, data, "plain")
    states = [everything(folder) for folder in (probing, tracking, plain)]
    for state in states[:2]:
        for key in ("architecture", "strategy_random", "table", "rows"):
            assert_same(state[key], states[2][key], key)


def test_replayed_rows_count_in_tokens_and_operations(tmp_path: Path) -> None:
    data = controlled({"capacity": 40, "fill": "task_end"}, mode="fixed", mean={"ratio": 0.25, "weight": 1.0}, every=1)
    folder = executed(tmp_path, data, "run")
    costs: dict[str, float] = {}
    for entry in read(folder):
        if entry["kind"] == "metric":
            costs |= {key: value for key, value in entry["values"].items() if key.startswith("cost/")}
    current, replayed = costs["cost/rows_current"], costs["cost/rows_replay"]
    assert 0.9 * 3 * 12 * 2 * 16 < current <= 3 * 12 * 2 * 16, "passes end in shorter batches"
    assert 0.9 * 2 * 12 * 2 * 4 < replayed <= 2 * 12 * 2 * 4
    assert (costs["cost/tokens_current"], costs["cost/tokens_replay"]) == (current, replayed), "a sample counts as one"
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    dense = sum(weight.numel() for weight in state["architecture"].values() if weight.ndim >= 2)
    assert costs["cost/training_flops"] == 3 * 2 * dense * (current + replayed)


def test_every_variant_of_the_shipped_study_is_sound_and_its_controllers_steer_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    small = {
        "stream.init_args.max_train_tokens": 30_000, "stream.init_args.max_eval_tokens": 640,
        "training.budget.steps": 6, "checkpoint.every_seconds": 0, "tracking.enabled": "false",
        "variants.controlled_probe.strategies.controller.init_args.every": 3,
        "variants.controlled_buffer.strategies.controller.init_args.every": 3,
        "variants.controlled_buffer.strategies.replay.init_args.capacity": 60,
    }  # fmt: skip
    loaded = load_study("replay_controller", [(key, str(value)) for key, value in small.items()])
    runs = {run.variant: run for run in expand(loaded) if run.seed == 0}
    preflight(list(runs.values()))
    for variant in ("controlled_buffer", "controlled_probe"):
        folder = tmp_path / variant
        folder.mkdir()
        save(runs[variant], folder / "config.yaml")
        assert execute(folder).status == "FINISHED"
        found = [
            e["values"] for e in read(folder) if e["kind"] == "metric" and "controller/controller/F" in e["values"]
        ]
        assert found and all(values["controller/controller/F"] >= 0 for values in found)


def test_probes_without_a_validation_set_and_unknown_replays_are_refused_before_training() -> None:
    data = controlled(signal="probe")
    data["stream"]["init_args"]["val_fraction"] = 0.0
    with pytest.raises(ConfigError, match=r"strategies\.controller: steers by losses on validation sets, .* signal"):
        preflight(expand(load_study(data)))
    with pytest.raises(ConfigError, match=r"strategies\.controller: strategy: 'repaly' is no replay of this run"):
        preflight(expand(load_study(controlled(strategy="repaly"))))
