"""Tests on real data: collected where $CLPLAT_DATA names the folder (docs/data.md says what lies there)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if not os.environ.get("CLPLAT_DATA"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the samples."""
    return Path(os.environ["CLPLAT_DATA"]).resolve()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder that is empty before a module's first test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLPLAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
