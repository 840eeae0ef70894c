"""What is installed: one top-level package, which works from any folder, with its shipped studies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from clplat.study_file import expand, load_study, shipped_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked sources, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source") / "clplat", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "runs", "tests", "mlflow.db")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_installs_no_top_level_module_but_clplat(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"clplat"}


def test_the_wheel_runs_a_study_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import clplat, clplat.kernels, clplat.streams.vision as v; "
        "assert clplat.__file__.startswith(sys.argv[1]) and v.__file__.startswith(sys.argv[1]); "
        "done = clplat.run('quickstart', {'training.budget': {'steps': 2}, 'seeds': [0], 'variants': {'naive': {}}, "
        "'tracking.enabled': False, 'launcher.workers': 1}, quiet=True); assert done.code == 0, done.outcomes"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(target)], cwd=tmp_path, check=True)
    assert list((tmp_path / "runs").glob("quickstart-*/naive-s0/artifacts/results.csv"))


@pytest.mark.parametrize(
    "name", sorted(p.relative_to(shipped_folder()).as_posix() for p in shipped_folder().rglob("*.yaml"))
)
def test_every_shipped_study_resolves(name: str) -> None:
    assert expand(load_study(name.removesuffix(".yaml")))


def test_the_contract_of_imports_names_every_room_of_the_platform() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {module.removeprefix("clplat.") for module in contracts[0]["forbidden_modules"]}
    rooms = {
        path.stem for path in (ROOT / "clplat").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__"} == named
