"""What tests of runs share: an MLflow database, made once since its migrations take seconds, and copied for each; two
question-answer tasks with a model that reads bytes; a recorder of steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from question_runs import BYTES
from small_models import model_folder
from tapes import Tape

from clplat import recording
from clplat.mlflow_store import client


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A fresh MLflow database."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def store(empty_store: bytes, tmp_path: Path) -> str:
    """The URI of a database of this test's own."""
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of two question-answer tasks, and one of a model that reads bytes."""
    root = tmp_path_factory.mktemp("tasks")
    for name, sign in (("plus", "+"), ("minus", "-")):
        (root / name).mkdir()
        rows = [{"prompt": f"{a}{sign}{b}=", "answer": str(a + b if sign == "+" else a - b)} for a in range(9)
                for b in range(9)]  # fmt: skip
        for part, chosen in (("train", rows[::2]), ("eval", rows[1::4]), ("test", rows[3::4])):
            (root / name / f"{part}.json").write_text(json.dumps(chosen))
    return root, model_folder(tmp_path_factory.mktemp("models"), "llama", vocab_size=BYTES, eos_token_id=BYTES - 1)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """What records steps in place of CUDA graphs, on a CPU too."""
    made = Tape()
    monkeypatch.setattr(recording, "recorder_for", lambda device: made)
    return made
