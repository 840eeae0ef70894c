"""MLflow's pages in a real browser: a study is found, compared and read, and its report needs no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow_walk import walk


@pytest.mark.long
def test_a_person_finds_a_study_compares_its_runs_and_reads_report_and_descriptions(tmp_path: Path) -> None:
    walk(tmp_path)
