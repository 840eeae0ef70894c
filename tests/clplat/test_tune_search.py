"""Searches by formulas in place of training: what is found, what is pruned, and what faults leave."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from rich.console import Console
from searches import folder_here, formulas, go_on, settings, stopped, tune

from clplat.config import RunConfig, save
from clplat.errors import ConfigError, Interrupted, StorageError, StudyFailedError
from clplat.journal import last_status, read
from clplat.study_file import load_study
from clplat.tuning import search, trials
from clplat.tuning.tune import resume_tune


def planted(config: RunConfig, row: int) -> float:
    """A hill whose top lies at lr 0.03, ratio 1.5, capacity 70."""
    lr, ratio, capacity = settings(config)
    return 1 - (math.log10(lr / 0.03) / 3) ** 2 - ((ratio - 1.5) / 2) ** 2 - ((capacity - 70) / 100) ** 2


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "front.csv").open() as file:
        return list(csv.DictReader(file))


def drawn(folder: Path) -> list[list[str]]:
    return [[row[key] for key in row if "init_args" in key] for row in csv_rows(folder)]


def test_the_planted_optimum_is_found_and_the_gain_over_the_default_is_measured_on_fresh_seeds() -> None:
    with formulas(planted) as runs:
        tuned = tune(tune__trials=30, tune__prune=False)
    assert tuned.status == "FINISHED" and tuned.best is not None
    lr, ratio, capacity = tuned.best.settings.values()
    assert 0.01 < lr < 0.09 and abs(ratio - 1.5) < 0.35 and abs(capacity - 70) < 20
    assert runs.ran[0] == "t0000-s1000" and tuned.rows[0].is_default
    assert runs.ran[30:] == ["default-s0", "default-s1", "best-s0", "best-s1"]
    gain = tuned.gains[0]
    assert gain.metric == "final_score"
    assert gain.difference.mean == pytest.approx(tuned.best.objectives["final_score"] - gain.default.mean)
    assert f"{gain.difference.mean:+.3f}" in tuned.text and "2 fresh seeds" in tuned.text


def test_settings_that_are_worse_on_the_full_stream_are_reported_as_worse() -> None:
    with formulas(lambda config, row: planted(config, row) * (1 if row < 3 else -1)):
        tuned = tune()
    assert tuned.gains[0].difference.mean < 0
    assert tuned.gains[1].metric == "final_score_unseen_tasks" and tuned.gains[1].difference.mean < 0
    assert f"final score −{abs(tuned.gains[0].difference.mean):.3f}" in tuned.text
    assert "With these seeds the default settings scored higher" in tuned.text
    assert "never saw: −" in tuned.text


def test_the_best_settings_are_a_study_ready_to_run_on_the_full_stream() -> None:
    with formulas(planted):
        tuned = tune()
    best = load_study(tuned.folder / "best.yaml")
    assert best.seeds == [0, 1] and best.tasks is None and not best.space and not best.variants
    assert best.training.optimizer.init_args["lr"] == tuned.best.settings["training.optimizer.init_args.lr"]
    assert (
        best.strategies["replay"].init_args["capacity"] == tuned.best.settings["strategies.replay.init_args.capacity"]
    )
    assert [path.stem for path in (tuned.folder / "front").glob("*.yaml")] == [tuned.best.name]


def test_a_grid_runs_each_of_its_points_once_and_the_default_first() -> None:
    space = {
        "training.optimizer.init_args.lr": {"choices": [0.01, 0.1]},
        "strategies.replay.init_args.ratio": {"low": 0.5, "high": 1.5, "step": 0.5},
    }
    with formulas(lambda config, row: settings(config)[1]):
        tuned = tune(space=space, tune={"sampler": "grid", "prune": False})
    points = [tuple(row.settings.values()) for row in tuned.rows]
    assert points[0] == (0.1, 1.0)
    assert sorted(points) == [(lr, ratio) for lr in (0.01, 0.1) for ratio in (0.5, 1.0, 1.5)]


def test_a_killed_search_goes_on_with_the_trials_that_it_would_have_had_and_repeats_none(tmp_path, monkeypatch) -> None:
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    with formulas(planted) as runs:
        whole = tune(tune__trials=12)
        expected = drawn(whole.folder)
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    with formulas(planted) as killed:
        killed.instead = {"t0004-s1000": stopped(), "t0010-s1000": stopped()}
        with pytest.raises(Interrupted):
            tune(tune__trials=12)
        folder = folder_here()
        assert not (folder / "front.csv").is_file()
        with pytest.raises(Interrupted):
            go_on(folder)
        resumed = go_on(folder)
    assert drawn(resumed.folder) == expected
    repeated = sorted(set(killed.ran), key=killed.ran.index)
    assert repeated == runs.ran
    assert len(killed.ran) == len(runs.ran) + 2 and resumed.text == whole.text


def test_a_run_that_finished_just_before_the_kill_is_told_on_resume_and_not_run_again(monkeypatch) -> None:
    with formulas(planted) as runs:
        with monkeypatch.context() as patch:
            patch.setattr(trials.Trials, "complete", lambda *_: (_ for _ in ()).throw(stopped()))
            with pytest.raises(Interrupted):
                tune()
        assert runs.ran == ["t0000-s1000"]
        resumed = go_on(folder_here())
    assert runs.ran.count("t0000-s1000") == 1 and len(resumed.rows) == 4


def test_a_finished_tune_runs_nothing_again_and_more_trials_may_be_asked_for() -> None:
    with formulas(planted) as runs:
        tuned = tune()
        ran = len(runs.ran)
        again = go_on(tuned.folder)
        assert len(runs.ran) == ran and again.text == tuned.text
        more = go_on(tuned.folder, ("tune.trials", "6"))
    assert len(more.rows) == 6
    with pytest.raises(ConfigError, match="tune.sampler: a resumed tune stays the same search"):
        go_on(tuned.folder, ("tune.sampler", "random"))


def test_an_edited_tune_is_refused_by_the_key_that_differs() -> None:
    with formulas(planted) as runs:
        tuned = tune()
        file = tuned.folder / "tune.yaml"
        file.write_text(file.read_text().replace("batch_size: 16", "batch_size: 17"))
        ran = len(runs.ran)
        with pytest.raises(ConfigError, match="training.batch_size: 16 → 17"):
            go_on(tuned.folder)
        assert len(runs.ran) == ran


def test_a_pruned_trial_is_no_failed_one() -> None:
    with formulas(planted) as runs:
        tuned = tune(tune__trials=12, tune__prune_after=3, tune__seeds=[7, 8], stream__init_args__num_tasks=6)
    pruned = [row for row in csv_rows(tuned.folder) if row["status"] == "PRUNED"]
    assert pruned and not any(row["status"] == "FAILED" for row in csv_rows(tuned.folder))
    assert all("worse than the median" in row["reason"] and not row["final_score"] for row in pruned)
    for row in pruned:
        assert last_status(tuned.folder / f"{row['trial']}-s7") == "PRUNED"
        assert f"{row['trial']}-s8" not in runs.ran
        unbegun = tuned.folder / f"{row['trial']}-s8"
        assert last_status(unbegun) == "PRUNED", "killed would be a run that can go on"
        assert list(read(unbegun))[-1]["reason"].startswith("not begun: its trial was pruned")
    assert tuned.status == "FINISHED" and tuned.code == 0
    finished = [float(row["final_score"]) for row in csv_rows(tuned.folder) if row["status"] == "FINISHED"]
    assert tuned.best.objectives["final_score"] == max(finished)


def test_the_default_is_never_pruned() -> None:
    with formulas(lambda config, row: -abs(settings(config)[0] - 1)):
        tuned = tune(tune__trials=8, tune__prune_after=1, stream__init_args__num_tasks=6, tune__seeds=[7, 8])
    assert tuned.rows[0].is_default and tuned.rows[0].state == "FINISHED"


def test_a_run_whose_process_died_goes_on_once_and_fails_the_second_time() -> None:
    class Dying(dict):
        """t0001 loses its process once, t0002 every time."""

        def pop(self, name, default=None):
            return ("FAILED", "process") if name == "t0002-s1000" else super().pop(name, default)

    with formulas(planted) as runs:
        runs.instead = Dying({"t0001-s1000": ("FAILED", "process")})
        tuned = tune()
    assert [row.state for row in tuned.rows] == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert [runs.ran.count(f"t000{number}-s1000") for number in range(4)] == [1, 2, 2, 1]
    assert "t0002-s1000: as planned" in tuned.rows[2].reason and tuned.status == "FINISHED"


def test_progress_counts_the_trials_of_the_whole_search_and_tells_how_each_ended(monkeypatch) -> None:
    worse = lambda values, finished, *_, **__: values[0] < 0  # noqa: E731
    monkeypatch.setattr(search, "worse_than_most", worse)
    said = Console(file=io.StringIO(), width=200)
    with formulas(lambda config, row: float(settings(config)[0] == 0.05 or -1)) as runs:
        runs.instead = {"t0002-s1000": stopped(), "t0003-s1000": ("FAILED", "")}
        with pytest.raises(Interrupted):
            tune(tune__tasks=3, stream__init_args__num_tasks=6)
        resume_tune(folder_here(), [], said)
    lines = said.file.getvalue().splitlines()
    assert "tuning on the first 3 of 6 tasks (2 of 4 trials)" in lines[0]
    assert (
        "t0002: pruned, t0002-s1000: after 2 tasks worse than the median of 1 finished trials (3 of 4 trials)" in lines
    )
    assert "t0003-s1000: FAILED. as planned" in lines and "t0003: failed (4 of 4 trials)" in lines
    assert said.file.getvalue().count("of 4 trials") == 3
    edited = folder_here() / "tune.yaml"
    edited.write_text(edited.read_text().replace("low: 0.25", "low: 0.2"))
    with pytest.raises(ConfigError, match="was begun with another configuration"):
        resume_tune(folder_here(), [], said := Console(file=io.StringIO()))
    assert "tuning on" not in said.file.getvalue()


def test_a_full_disk_ends_the_search_with_what_to_do_and_the_trial_goes_on_afterwards() -> None:
    with formulas(planted) as runs:
        runs.instead = {"t0002-s1000": ("FAILED", "storage")}
        with pytest.raises(StorageError, match="as planned `clplat resume .*` goes on"):
            tune()
        assert runs.ran == ["t0000-s1000", "t0001-s1000", "t0002-s1000"]
        tuned = go_on(folder_here())
    assert [row.state for row in tuned.rows] == ["FINISHED"] * 4


def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(monkeypatch) -> None:
    def full(config, path):
        if "t0002" in config.variants:
            raise OSError(28, "No space left on device")
        save(config, path)

    with formulas(planted) as runs:
        with monkeypatch.context() as patch:
            patch.setattr(search, "save", full)
            with pytest.raises(StorageError, match="No space left on device.*Free some space, then `clplat resume"):
                tune()
        assert runs.ran == ["t0000-s1000", "t0001-s1000"]
        tuned = go_on(folder_here())
        assert runs.ran[2] == "t0002-s1000" and [row.state for row in tuned.rows] == ["FINISHED"] * 4


def test_trials_that_fail_of_themselves_are_counted_and_told_when_none_is_left() -> None:
    with formulas(planted) as runs:
        runs.instead = {f"t{number:04d}-s1000": ("FAILED", "") for number in range(4)}
        with pytest.raises(StudyFailedError, match="no trial has finished; the first said: t0000-s1000: as planned"):
            tune()
        assert len(runs.ran) == 4


def test_several_objectives_give_a_front_and_its_best_by_the_first() -> None:
    with formulas(lambda config, row: settings(config)[1] / 2):
        tuned = tune(tune__trials=5, tune__objectives=["final_score", "cost/training_flops"])
    assert all(row.on_front for row in tuned.rows if row.objectives)  # every ratio is a trade-off of its own
    assert tuned.best.objectives["final_score"] == max(row.objectives["final_score"] for row in tuned.rows)


def test_every_run_is_tagged_with_what_was_tuned_on() -> None:
    def tags(folder: Path) -> dict[str, str]:
        return {key: v for entry in read(folder) if entry["kind"] == "tags" for key, v in entry["values"].items()}

    with formulas(planted):
        honest = tune(tune__trials=2)
        on_test = tune(tune={"trials": 2, "on_test_sequence": True}, name="seen")
    for tuned, word, what in (
        (honest, "false", "the first 2 of 3 tasks"),
        (on_test, "true", "the test sequence itself"),
    ):
        for run in [tuned.folder / "t0000-s1000", tuned.report.folder / "default-s0"]:
            assert tags(run)["on_test_sequence"] == word and tags(run)["tuned_on"] == what
    assert "biased upwards" in on_test.text or on_test.best.is_default
    assert "never saw" not in on_test.text


def test_after_its_timeout_a_search_begins_no_further_trial_and_reports() -> None:
    with formulas(planted):
        tuned = tune(tune__timeout=1e-6)
    assert [row.is_default for row in tuned.rows] == [True] and tuned.status == "FINISHED"
    assert "The default settings are the best" in tuned.text
