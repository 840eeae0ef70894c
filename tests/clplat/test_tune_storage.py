"""One storage that several tunes share: who runs what, and what becomes of trials whose tune is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from searches import folder_here, formulas, go_on, settings, stopped, tune

from clplat.config import RunConfig
from clplat.errors import ConfigError, Interrupted, StorageError
from clplat.tuning import trials


def planted(config: RunConfig, row: int) -> float:
    return 1 - abs(settings(config)[1] - 1.5)


def shared(tmp_path: Path, trials_in_all: int = 6) -> dict[str, object]:
    return {"trials": trials_in_all, "storage": f"sqlite:///{tmp_path / 'shared.db'}", "prune": False}


def test_two_tunes_on_one_storage_share_the_trials_and_the_one_that_ends_last_reports(tmp_path: Path) -> None:
    with formulas(planted) as runs:
        runs.instead = {"t0002-s1000": stopped()}
        with pytest.raises(Interrupted):
            tune(tune=shared(tmp_path))
        first = folder_here().resolve()
        before = list(runs.ran)
        second = tune(tune=shared(tmp_path))
    assert before == ["t0000-s1000", "t0001-s1000", "t0002-s1000"]
    mine = [name for name in runs.ran[len(before) :] if name.startswith("t")]
    assert mine == ["t0003-s1000", "t0004-s1000", "t0005-s1000"]
    assert second.status == "KILLED" and "5 finished, 1 not ended" in second.text and second.report is None
    with formulas(planted) as rest:
        resumed = go_on(first)
        assert rest.ran[0] == "t0002-s1000" and len(resumed.rows) == 6
        assert resumed.report is not None and resumed.status == "FINISHED"
        again = go_on(second.folder)
    assert f"The report is made by the tune in {first}" in again.text


@pytest.mark.long
def test_a_trial_whose_tune_has_fallen_silent_is_begun_again_by_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trials, "GRACE_SECONDS", 1)
    with formulas(planted) as runs:
        runs.instead = {"t0001-s1000": stopped()}
        with pytest.raises(Interrupted):
            tune(tune=shared(tmp_path, 3))
        lost = folder_here().resolve()
        time.sleep(2.2)
        other = tune(tune=shared(tmp_path, 3))
    states = {row.name: row.state for row in other.rows}
    assert states == {"t0000": "FINISHED", "t0001": "FAILED", "t0002": "FINISHED", "t0003": "FINISHED"}
    again = {row.name: row.settings for row in other.rows}
    assert again["t0001"] in (again["t0002"], again["t0003"])  # the same settings, another number
    assert other.status == "FINISHED" and other.report is not None
    with formulas(planted) as late:
        late_one = go_on(lost)
    assert not late.ran and "The report is made by the tune" in late_one.text


def test_a_search_of_another_configuration_is_not_joined(tmp_path: Path) -> None:
    with formulas(planted) as runs:
        tune(tune=shared(tmp_path, 1))
        ran = len(runs.ran)
        with pytest.raises(ConfigError, match="training.batch_size: 16 → 8.*give the new search another `name`"):
            tune(tune=shared(tmp_path, 1), training__batch_size=8)
        with pytest.raises(ConfigError, match="holds a search 'digits' with other objectives"):
            tune(tune=shared(tmp_path, 1) | {"objectives": ["final_forgetting"]})
        assert len(runs.ran) == ran
        tune(tune=shared(tmp_path, 1), training__batch_size=8, name="another")


def test_a_storage_that_cannot_be_used_is_said_with_what_to_do_and_without_its_password() -> None:
    with pytest.raises(StorageError, match="sqlite:////nowhere/at/all.db cannot be used .*nothing has been begun"):
        tune(tune={"storage": "sqlite:////nowhere/at/all.db"})
    driver = "needs a driver that is not installed: pip install 'psycopg|pip install psycopg2-binary"
    with pytest.raises(ConfigError, match=driver) as raised:
        tune(tune={"storage": "postgresql://me:secret@localhost:1/db"})
    assert "secret" not in str(raised.value) and "localhost:1/db" in str(raised.value)
    with pytest.raises(ConfigError, match="tune.storage: foo://x is the address of no database that is known"):
        tune(tune={"storage": "foo://x"})
    assert not Path("runs").exists()


def test_a_storage_that_fails_on_the_way_ends_the_search_and_the_trial_goes_on_afterwards(monkeypatch) -> None:
    def full(self, trial, place, step, values):
        raise StorageInternalError("database or disk is full")

    with formulas(planted) as runs:
        with monkeypatch.context() as patch:
            patch.setattr(trials.Trials, "passed", full)
            with pytest.raises(StorageError, match="database or disk is full.*free some space.*`clplat resume runs"):
                tune(tune__trials=2)
        assert runs.ran == ["t0000-s1000"]
        tuned = go_on(folder_here())
    assert runs.ran.count("t0000-s1000") == 1 and [row.state for row in tuned.rows] == ["FINISHED"] * 2


def test_a_trial_that_was_cut_short_while_it_was_asked_for_is_given_back(monkeypatch) -> None:
    def cut(self, number):
        raise stopped()

    with formulas(planted) as runs:
        with monkeypatch.context() as patch:
            patch.setattr(trials.Trials, "_claim", cut)
            with pytest.raises(Interrupted):
                tune(tune__trials=2)
        assert not runs.ran
        tuned = go_on(folder_here())
    assert [row.state for row in tuned.rows] == ["FAILED", "FINISHED", "FINISHED"]
    assert [row.is_default for row in tuned.rows if row.state == "FINISHED"] == [True, False]
