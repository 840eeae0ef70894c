"""Numbers that mean nothing, and more of the machine than there is, are refused by key before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import run_folder, study

from clplat import machine
from clplat.api import resume
from clplat.config import TrainingConfig
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.machine import check_room, cores
from clplat.study import lay_out, run_study
from clplat.study_file import expand, load_study


def rate(lr: float) -> dict[str, Any]:
    return {"training__optimizer": {"class_path": "SGD", "init_args": {"lr": lr}}}


ENDLESS = {"er": {"class_path": "ExperienceReplay", "init_args": {"capacity": 9, "ratio": float("nan")}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (rate(float("nan")), r"^training\.optimizer\.init_args\.lr: .*nan"),
        (rate(float("inf")), r"^training\.optimizer\.init_args\.lr: .*inf"),
        ({"training__budget": {"epochs": float("inf")}}, r"^training\.budget\.epochs: must be a finite number"),
        ({"training__budget": {"steps": 5, "until": {"accuracy": float("nan")}}}, r"^training\.budget\.until\."),
        ({"training__clip_norm": float("nan")}, r"^training\.clip_norm: must be a finite"),
        ({"training__clip_norm": 0}, r"^training\.clip_norm: must be positive"),
        ({"training__clip_norm": -1}, r"^training\.clip_norm: must be positive"),
        ({"evaluation": {"every": 0}}, r"^evaluation\.every: must be at least 1, got 0"),
        ({"evaluation": {"every": -1}}, r"^evaluation\.every: must be at least 1"),
        ({"checkpoint__every_seconds": -1}, r"^checkpoint\.every_seconds: must be at least 0"),
        ({"strategies": ENDLESS}, r"^strategies\.er\.init_args\.ratio"),
        ({"variants": {"b": {"training": {"clip_norm": float("nan")}}}}, r"^variants\.b\.training\.clip_norm"),
        ({"variants": {"b": {"training": {"batch_size": 0}}}}, r"^variants\.b\.training\.batch_size: must be"),
        ({"name": "a" * 300}, r"^name: use up to 100 letters"),
        ({"variants": {"b" * 300: {}}}, r"^variants\.bbb.*: use up to 100 letters"),
    ],
)  # fmt: skip
def test_numbers_and_names_out_of_range_are_refused_when_the_file_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study(**changes)))
    with pytest.raises(ConfigError, match=message):
        expand(load_study(file))


def test_a_bound_of_a_strategy_may_be_infinite(tmp_path: Path) -> None:
    maml = {"class_path": "LaMAML", "init_args": {"capacity": 20, "clip": float("inf")}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(strategies={"maml": maml})))
    assert expand(load_study("study.yaml"))[0].strategies["maml"].init_args["clip"] == float("inf")


@pytest.mark.parametrize("changes", [{"threads": 9999}, {"devices": 64, "accelerator": "cpu"}])
def test_more_threads_or_processes_than_cores_are_refused_and_nothing_is_written(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    data = study()
    data["training"] |= changes
    with pytest.raises(
        ConfigError, match=rf"^training\.{next(iter(changes))}: is \d+, and .* 4 .*; set it to 4 or less"
    ):
        run_study(load_study(data), None)  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()


def test_as_many_threads_and_processes_as_cores_are_let_through_and_two_processes_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_room(TrainingConfig(threads=cores(), devices=cores(), accelerator="cpu"))
    monkeypatch.setattr(machine, "cores", lambda: 1)
    check_room(TrainingConfig(devices=2, accelerator="cpu"))


def test_a_gpu_where_there_is_none_is_what_is_missing_however_many_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^training\.accelerator: 'gpu' was asked for, and torch sees none"):
        check_room(TrainingConfig(devices=8, accelerator="gpu"))


def test_a_study_from_a_larger_machine_is_refused_before_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_study(study(training__threads=2))
    folder = lay_out(config, expand(config))
    monkeypatch.setattr(machine, "cores", lambda: 1)
    for target in (folder, folder / "digits-s0"):
        with pytest.raises(ConfigError, match=r"training\.threads: is 2.* resume it on a larger machine"):
            resume(target)


THREE = {"a": {}, "b": {"training": {"batch_size": 8}}, "c": {"training": {"batch_size": 4}}}


@pytest.mark.parametrize(
    ("overrides", "kept", "baseline"),
    [
        ([("variants", "a,c")], ["a", "c"], "a"),
        ([("variants", '["c", "b"]')], ["c", "b"], None),
        ([("variants", "b")], ["b"], None),
        ([("variants.c", "null")], ["a", "b"], "a"),
        ([("variants.a", "null"), ("baseline", "b")], ["b", "c"], "b"),
    ],
)
def test_some_variants_alone_can_be_run(
    overrides: list[tuple[str, str]], kept: list[str], baseline: str | None
) -> None:
    chosen = load_study(study(variants=THREE, baseline="a"), overrides)
    assert list(chosen.variants) == kept and chosen.baseline == baseline
    assert chosen.variants["b" if "b" in kept else "c"] == THREE["b" if "b" in kept else "c"]


def test_a_variant_that_is_not_there_cannot_be_chosen() -> None:
    with pytest.raises(ConfigError, match="--variants: no variant is called 'bb'; did you mean"):
        load_study(study(variants={"bbb": {}, "cc": {}}), [("variants", "bb")])


def test_a_variant_without_changes_in_a_file_is_not_taken_for_one_that_is_left_out() -> None:
    with pytest.raises(ConfigError, match=r"variants\.a: must be a mapping"):
        load_study(json.loads(json.dumps(study(variants={"a": None}))))


def test_a_run_that_finds_no_gpu_ends_as_failed_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = execute(run_folder(tmp_path, study(training__accelerator="gpu")))
    assert outcome.status == "FAILED" and "'gpu' was asked for, and torch sees none" in outcome.reason
