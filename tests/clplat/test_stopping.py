"""A request to stop ends a command at once where there is nothing to save: in words, and with the right exit code."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from studies import study

from clplat.cli import main
from clplat.interruption import Interruption, passed_on

STOPPED = '''
import os, signal
from clplat.strategies.base import Strategy
from clplat.streams.vision import SplitDigits


class Stopped(Strategy):
    """Somebody stops the process in the middle of a step."""

    def __init__(self, *, number: int) -> None:
        self.number = number

    def penalty(self, output, batch):
        os.kill(os.getpid(), self.number)


class StoppedDigits(SplitDigits):
    """Somebody stops the process while the data are read."""

    def prepare(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        super().prepare()
'''


@pytest.fixture(autouse=True)
def stopped(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_dry_run_stops_inside_a_step(
    name: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = {"class_path": "stopped.Stopped", "init_args": {"number": int(signal.Signals[name])}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(strategies={"stop": stop})))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        main(["run", "study.yaml", "--dry-run"])
    assert ended.value.code == code
    assert f"clplat run: stopped by {name}" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_study_that_is_stopped_before_its_first_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study()))
    monkeypatch.setattr("clplat.study.launch", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main(["run", "study.yaml"])
    (folder,) = (tmp_path / "runs").iterdir()
    said = capsys.readouterr().err
    assert ended.value.code == 75 and f"stopped by SIGTERM; `clplat resume runs/{folder.name}` starts" in said, said


@pytest.mark.parametrize("order", [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_ctrl_c_that_comes_from_the_terminal_and_from_the_launcher_is_one_request_and_the_next_ends_at_once(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    assert {passed_on(signal.SIGINT), passed_on(signal.SIGTERM)} == {signal.SIGTERM}
    stop = Interruption()
    with stop.listening():
        for name in order:
            signal.raise_signal(signal.Signals[name])
        assert stop.requested == "SIGINT" and ended == []
        signal.raise_signal(signal.SIGINT)
    assert ended == [130]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_study_stops_while_its_data_are_read(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(stream__class_path="stopped.StoppedDigits")))
    with pytest.raises(SystemExit) as ended:
        main(["run", "study.yaml", *options])
    assert ended.value.code == 75 and "stopped by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
