"""Tests on real data: collected where $CLPLAT_DATA names the folder (docs/data.md says what lies there)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if not os.environ.get("CLPLAT_DATA"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the samples."""
    return Path(os.environ["CLPLAT_DATA"]).resolve()
