"""What a profiled step is made of, from a trace of which the answer is known."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def event(name: str, start: float, length: float, kind: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length}


def test_what_is_exchanged_beside_computing_and_alone_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("multi_gpu").parts_of_time({"traceEvents": [
        event("gemm", 1000, 2000), event("add", 1500, 1000),  # one inside the other
        event("ncclDevKernel_AllReduce", 2000, 3000),  # 1 ms beside gemm, 2 alone
        event("copy", 6000, 500, "gpu_memcpy"),  # after 1 ms of nothing
        event("nccl:all_reduce", 0, 100, "user_annotation"), event("aten::add", 0, 9000, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]})  # fmt: skip
    assert found == pytest.approx({"computes": 2.5, "exchanges": 3.0, "exchanges_alone": 2.0, "waits": 1.0, "count": 1})
