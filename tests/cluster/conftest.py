"""A cluster to test on: a Slurm of one node, started for the session; a Ray, started by each study."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "one_node_slurm.sh"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The configuration of a running Slurm; what is missing here fails the tests, and is named."""
    # Sockets have short names.
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=120, check=False)
    if started.returncode != 0:
        pytest.fail(f"no Slurm could be started here (apt-get install slurm-wlm):\n{started.stderr[-3000:]}")
    yield started.stdout.strip().partition("=")[2]
    subprocess.run([SCRIPT, "stop", folder], timeout=60, check=True)


@pytest.fixture(params=["ray", "slurm"])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The `launcher:` block of a study for each of the two."""
    if request.param == "slurm":
        monkeypatch.setenv("SLURM_CONF", request.getfixturevalue("slurm"))
    return {"kind": request.param, "workers": 2, "slurm": {"poll_seconds": 1}}
