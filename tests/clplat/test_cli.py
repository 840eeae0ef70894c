"""The command line: quick help, true exit codes, errors on one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from studies import study

from clplat.cli import main


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(training__budget={"steps": 4})))
    return str(path)


def test_help_imports_neither_torch_nor_mlflow() -> None:
    heavy = "sorted({'torch', 'mlflow', 'lightning', 'rich', 'numpy', 'yaml'} & sys.modules.keys())"
    code = (
        f"import sys\ntry:\n    from clplat.cli import main; main(['--help'])\nexcept SystemExit:\n    print({heavy})"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("run", "resume", "compare", "report", "evaluate", "reproduce", "sync", "ui", "list", "show"):
        assert command in done.stdout


def test_run_resume_evaluate_and_show_work_on_one_study(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = ran(capsys, "run", config, "--training.batch_size", "8", "--seeds=[3]")
    assert code == 0 and "clplat sync" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "digits-s3" / "artifacts" / "results.csv").is_file()
    code, out, _ = ran(capsys, "resume", str(folder / "digits-s3"))
    assert code == 0 and "finished already" in out
    code, out, _ = ran(capsys, "evaluate", str(folder / "digits-s3"))
    assert code == 0 and "accuracy" in out
    code, out, _ = ran(capsys, "show", config, "--training.batch_size", "8")
    assert code == 0 and yaml.safe_load(out)["training"]["batch_size"] == 8


def test_a_dry_run_estimates_and_leaves_nothing_behind(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = ran(capsys, "run", config, "--dry-run")
    assert code == 0 and "about" in out and not (tmp_path / "runs").exists()


def test_a_dry_run_beside_other_work_says_that_it_is_too_high(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (5.25, 1.0, 1.0))
    code, out, _ = ran(capsys, "run", config, "--dry-run")
    assert code == 0 and "other work kept 5.2 of" in " ".join(out.split())


@pytest.mark.parametrize("workers", [1, 2])
def test_into_a_file_every_run_that_finished_is_a_line_on_the_error_output(
    config: str, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    code, out, err = ran(capsys, "run", config, "--seeds=[0, 1]", f"--launcher.workers={workers}")
    assert code == 0 and "finished in" not in out
    lines = [line for line in err.splitlines() if "finished in" in line]
    assert [line.rpartition(", ")[2] for line in lines] == ["1 of 2", "2 of 2"]
    assert {line.partition(":")[0] for line in lines} == {"digits-s0", "digits-s1"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nowhere"], 1, "no such file"),
        (["run", "quickstrat"], 1, "did you mean 'quickstart'"),
        (["run", "quickstart", "--training.batchsize", "3"], 1, "did you mean 'batch_size'"),
        (["run", "quickstart", "--training.batch_size"], 2, "a value is missing"),
        (["resume", "."], 1, "neither a run folder"),
        (["list", "stream"], 1, "did you mean 'streams'"),
        (["compare", "quickstart", "--wrong"], 2, "unrecognized argument"),
        (["report", "unheard-of"], 1, "there is no database mlflow.db"),
        (["ui", "--uri", "sqlite:///gone/x.db"], 1, "there is no database gone/x.db"),
        (["compare", "x", "--uri", "sqlite:///gone/x.db"], 1, "there is no database gone/x.db"),
        (["run", "quickstart", "--variant", "nope"], 1, "--variant: no variant is called 'nope'"),
        (["run", "quickstart", "--seed", "17"], 1, "--seed: 17 is none of the study's seeds (0, 1, 2)"),
        (["run", "quickstart", "--tracking.uri", "foo://bar"], 1, "MLflow knows no 'foo'; known: databricks"),
        (["run", "quickstart", "--tracking.uri", "htp://x"], 1, "MLflow knows no 'htp'; did you mean 'http'"),
        (["run", "quickstart", "--tracking.uri", "./mlruns"], 1, "tracking.uri: ./mlruns is a folder"),
        (["run", "quickstart", "--tracking.uri", "mysql+nothing://x/y"], 1, "mysql+nothing://x/y is no database"),
    ],
)
def test_errors_are_one_line_with_the_fix_and_the_right_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    got, _, err = ran(capsys, *arguments)
    assert got == code
    assert message in err and "Traceback" not in err
    assert not list(Path().iterdir()), "nothing is left"


def test_list_shows_every_wing_and_the_shipped_studies(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ran(capsys, "list")
    assert code == 0
    for name in ("SplitDigits", "Transformer", "ExperienceReplay", "torch.optim", "quickstart"):
        assert name in out


def test_doctor_finds_everything_that_the_package_depends_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ran(capsys, "doctor")
    assert code == 0 and "torch" in out and "missing" not in out
