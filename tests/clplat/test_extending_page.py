"""docs/extending.md: its files are taken out of the page as they stand, run, checked, stopped and resumed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import clplat
from clplat.cli import main
from clplat.journal import last_status, read, table
from clplat.study_file import run_folders

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ONCE = """
import pathlib, signal
from clplat.strategies.base import Strategy
class Once(Strategy):
    def task_end(self, task):
        mark = pathlib.Path(f"stopped-{self.context.task.index}")
        if task.index == 1 and not mark.exists():
            mark.touch()
            signal.raise_signal(signal.SIGTERM)
"""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An outside folder with every file of the page, in which clplat is started."""
    for text in blocks("python") + blocks("yaml"):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        assert name, f"a block without a file's name: {text[:60]}"
        (tmp_path / name[1]).write_text(text)
    return tmp_path


SMALL = {"training.budget": {"steps": 6}, "stream.init_args.rows": 40, "launcher.workers": 1, "tracking.enabled": False}


def test_the_study_of_the_page_runs_end_to_end_and_every_kind_of_class_does_its_work(folder: Path) -> None:
    done = clplat.run("my_study.yaml", SMALL | {"seeds": [0]}, quiet=True)
    assert done.status == "FINISHED"
    variants = {run.name.rpartition("-")[0]: run for run in run_folders(done.folder)}
    assert variants.keys() == {"naive", "anchor", "steered", "growing"}
    assert [task for task in table(variants["naive"]).tasks()] == ["blobs-0", "blobs-1", "blobs-2"]
    decisions = [entry for entry in read(variants["steered"]) if entry["kind"] == "decision"]
    assert {(entry["strategy"], entry["knob"]) for entry in decisions} == {("replay", "ratio")}
    assert clplat.load_model(variants["growing"]).structure() == {"width": 8 + 2 * 4}
    finals = {name: str(table(run).to_rows()) for name, run in variants.items()}
    assert len(set(finals.values())) == 4, "each class changes what is learned"


def test_each_class_of_the_page_resumes_to_the_same_result(folder: Path) -> None:
    (folder / "once.py").write_text(ONCE)
    whole = clplat.run("my_study.yaml", SMALL | {"seeds": [0]}, quiet=True)
    for variant in ("anchor", "steered", "growing"):
        stop = {f"variants.{variant}.strategies.once": {"class_path": "once.Once"}}
        for mark in folder.glob("stopped-*"):
            mark.unlink()
        keep = {"seeds": [0], "baseline": variant}
        broken = clplat.run(only(variant), SMALL | keep | stop, quiet=True)
        assert last_status(broken.folder / f"{variant}-s0") == "KILLED"
        assert clplat.resume(broken.folder).status == "FINISHED"
        again, before = (table(place.folder / f"{variant}-s0").to_rows() for place in (broken, whole))
        assert str(again) == str(before), variant


def only(variant: str) -> dict[str, object]:
    """The page's study with one of its variants."""
    import yaml

    data = yaml.safe_load(Path("my_study.yaml").read_text())
    return data | {"variants": {variant: data["variants"][variant]}}


def test_the_commands_of_the_page_say_what_the_page_says_they_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line)
        assert words[0] == "clplat"
        if words[1] == "run":  # at its own size it is run above, smaller
            continue
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        told = capsys.readouterr()
        said += told.err.splitlines()
        assert ended.value.code == (1 if "--" in line else 0), told.err
    assert said == "".join(blocks("text")).splitlines()


def test_the_tests_of_the_page_pass(folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout


def test_refused_options_name_the_option(folder: Path) -> None:
    from clplat.errors import ConfigError

    for key, value, what in (
        ("variants.anchor.strategies.anchor.init_args.strength", -1.0, "strength: -1.0 pulls away"),
        ("stream.init_args.rows", 2, "rows: 2 leave nothing"),
    ):
        with pytest.raises(ConfigError, match=what):
            clplat.run("my_study.yaml", SMALL | {key: value}, quiet=True)
    assert not Path("runs").exists() and json.dumps(SMALL)
