"""Which ptxas the kernels are assembled with on Hopper."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from clplat.kernels import assembler

RELEASE = "Cuda compilation tools, release {}, V{}.1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the programs that come with Triton."""
    monkeypatch.setenv(assembler.CHOICE, "")  # so that what the code sets is taken back
    monkeypatch.delenv(assembler.CHOICE)
    monkeypatch.setattr(assembler, "_folder", lambda: tmp_path)
    return tmp_path


def made(program: Path, version: str) -> Path:
    program.write_text(f"#!/bin/sh\necho '{RELEASE.format(version, version)}'\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("version", ["12.9", "13.0", "20.1"])
def test_a_sound_assembler_stays(folder: Path, version: str) -> None:
    made(folder / "ptxas", version)
    assert assembler.fault_on_hopper() == "" and assembler.CHOICE not in os.environ


def test_one_that_makes_faulty_code_gives_way_to_the_other_of_triton(folder: Path) -> None:
    made(folder / "ptxas", "12.8")
    made(folder / "ptxas-blackwell", "12.9")
    assert assembler.fault_on_hopper() == ""
    assert os.environ[assembler.CHOICE] == str(folder / "ptxas-blackwell")
    assert assembler.fault_on_hopper() == ""


def test_without_another_one_the_kernels_are_refused_with_the_remedy(folder: Path) -> None:
    made(folder / "ptxas", "12.8")
    assert "version 12.8, and Hopper needs ptxas 12.9 or newer: set TRITON_PTXAS_PATH" in assembler.fault_on_hopper()


def test_a_choice_of_the_user_is_kept_and_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(folder / "ptxas-blackwell", "13.3")
    monkeypatch.setenv(assembler.CHOICE, str(made(folder / "own", "12.4")))
    assert str(folder / "own") in assembler.fault_on_hopper()
    monkeypatch.setenv(assembler.CHOICE, str(folder / "missing"))
    assert "does not run" in assembler.fault_on_hopper()


def test_the_compiler_takes_the_answer_as_a_constant(folder: Path) -> None:
    made(folder / "ptxas", "12.9")

    @torch.compile(fullgraph=True, backend="eager")
    def guarded(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if assembler.fault_on_hopper() == "" else x

    assert guarded(torch.ones(2)).tolist() == [2.0, 2.0]


def test_the_assembler_that_comes_with_triton_is_read() -> None:
    pytest.importorskip("triton")
    assert len(assembler.version(assembler._folder() / "ptxas")) == 2
