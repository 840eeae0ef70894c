"""The kernels themselves: what they touch, what becomes of them on a GPU, and the walk that is cut into groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_memories import Case, assert_close, by, definition, problem
from triton.runtime import interpreter

from clplat.kernels.delta_memory import launch

COMPILER = Path(__file__).parents[1] / "support" / "hopper_compiler.py"
HOPPER_SHARED_BYTES = 227 * 1024


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address that a kernel reads or writes must lie in the storage of one of its arguments."""
    held: list[tuple[int, int]] = []
    place = interpreter.GridExecutor._init_args_hst

    def placed(self: Any, arguments: Any, named: Any) -> Any:
        given = place(self, arguments, named)
        storages = [part.untyped_storage() for part in given[0] if isinstance(part, torch.Tensor)]
        held[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        return given

    def watched(access: Any) -> Any:
        def call(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if access.__name__.endswith("load") else rest[1]
            touched = pointers.data[mask.data.astype(bool)].astype(np.uint64)
            size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
            inside = np.zeros(touched.shape, bool)
            for first, end in held:
                inside |= (touched >= first) & (touched + size <= end)
            assert inside.all(), f"{(~inside).sum()} addresses of a {access.__name__} lie in no argument"
            return access(self, pointers, *rest)

        return call

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", placed)
    builder = interpreter.InterpreterBuilder
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(builder, name, watched(getattr(builder, name)))


GUARDED = [
    Case(mode="exact", tokens=70, chunk=64, D=20, E=24, heads=1, group=2),
    Case(mode="gdn", tokens=33, chunk=16, D=16, E=40, batch=2, momentum=False),
    Case(mode="hebb", tokens=17, chunk=16, D=24, E=16, heads=2, decay=False),
    Case(mode="frozen", chunk=16, D=20, E=20, lengths=(3, 0, 30), offsets=(2, 5, 15)),
]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("case", GUARDED, ids=str)
def test_no_kernel_touches_memory_outside_its_arguments(case: Case) -> None:
    by(case, problem(case), "triton")


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("mode", ["hebb", "frozen", "exact", "gdn"])
def test_a_walk_cut_into_groups_is_the_whole_walk(mode: Any, momentum: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(mode=mode, tokens=64, chunk=16, batch=2, D=16, E=24, momentum=momentum)
    cuts = []
    monkeypatch.setattr(launch, "num_groups", lambda layout: cuts.append(layout) or 4)
    found = by(case, problem(case), "triton")
    assert cuts, "the walk was not cut"
    assert_close(found, definition(case, problem(case)), forward=2e-6, backward=1e-5)


def test_every_kernel_compiles_for_a_hopper_gpu_and_fits_its_shared_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", str(COMPILER)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    occupied = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in occupied} == {
        "linear", "prepare", "scan", "scan_back", "scores", "gather", "gates",
    }  # fmt: skip
    assert max(int(size) for _, size in occupied) <= HOPPER_SHARED_BYTES
