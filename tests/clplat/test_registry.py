"""Registered models: they answer as the run's own model does, without data and code; what cannot be is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from studies import REPLAY, study

import clplat
from clplat.errors import ConfigError
from clplat.mlflow_store import client
from clplat.registry import register
from clplat.streams.batch import Batch
from clplat.tracking import RUN_STATE


@pytest.fixture
def run(store: str) -> Path:
    tracking = {"enabled": True, "uri": store, "system_metrics": False}
    done = clplat.run(study(tracking=tracking, variants={"er": {"strategies": {"replay": REPLAY}}}), quiet=True)
    return done.folder / "er-s0"


def test_a_registered_model_is_versioned_linked_to_its_run_and_gives_equal_outputs(
    run: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = register(run), register(run)
    assert (first.name, int(first.version), int(second.version)) == ("digits-er", 1, 2)
    assert client(store).get_run(first.run_id).info.run_name == "er-s0"
    batch = Batch(inputs=torch.rand(7, 1, 8, 8), targets=torch.zeros(7, dtype=torch.long))
    with torch.no_grad():
        own = clplat.load_model(run)(batch).logits
        shutil.rmtree(run.parent)
        # Neither the run's folder nor its data are needed.
        monkeypatch.setattr("clplat.assembly.prepared_stream", None)
        assert torch.equal(clplat.load_model("models:/digits-er/1", store)(batch).logits, own)


def test_what_cannot_be_registered_is_refused_with_the_fix(run: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a registered model; leave out / and :"):
        register(run, "a/b")
    kept = (run / RUN_STATE).read_text()
    (run / RUN_STATE).unlink()
    with pytest.raises(ConfigError, match=r"`clplat sync .*er-s0` sends it"):
        register(run)
    (run / RUN_STATE).write_text(kept)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="no checkpoint is left.*put its folder `checkpoints` back"):
        register(run)
    (run / "journal.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"has not finished \(WAITING\); `clplat resume .*er-s0` finishes it"):
        register(run)


def test_a_model_that_the_registry_has_not_got_is_named(store: str) -> None:
    with pytest.raises(ConfigError, match="models:/nothing/1: MLflow at .* does not give this model"):
        clplat.load_model("models:/nothing/1", store)
