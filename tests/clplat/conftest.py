"""An MLflow database for tests: made once, since its migrations take seconds, and copied for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from clplat.tracking import client


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
