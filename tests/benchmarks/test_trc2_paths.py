"""Both ways through a TRC² model are those of its rows: current ones with loops, replayed ones without."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions, WriteOptions
from clplat.streams.batch import IGNORE
from clplat.streams.stdlib_text import StdlibText

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trc2_paths.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trc2_paths", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loops_count_in_one_loss_and_not_in_the_other(script: ModuleType, tmp_path: Path) -> None:
    stream = StdlibText(block_size=16, max_train_tokens=2000, max_eval_tokens=1600, cache_dir=str(tmp_path))
    stream.prepare()
    torch.manual_seed(0)
    model = TRC2(
        spec=stream.spec, hidden_size=16, num_layers=2, dropout=0.0,
        column=ColumnOptions(num_heads=2, heads_per_kv=2, inner_size=16, num_experts=2),
        thalamus=ThalamusOptions(rank=8), hippocampus=HippocampusOptions(slots=16, k_read=4),
        write=WriteOptions(quota=4),
    ).eval()  # fmt: skip
    task = stream.tasks[0]
    first = script.loss(model, task, alone=True)
    assert script.loss(model, task, alone=False) == pytest.approx(first, abs=1e-6), "nothing modulates at first"
    with torch.no_grad():
        model.columns[1].attention.modulation.weight.normal_()
        batch = task.test.data.batch(torch.arange(len(task.test.data)))
        expected = F.cross_entropy(model(batch).logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    assert script.loss(model, task, alone=True) == first
    assert script.loss(model, task, alone=False) == pytest.approx(float(expected), abs=1e-5)
    assert abs(float(expected) - first) > 1e-4


def test_a_folder_without_such_runs_is_said_to_have_none(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "trc2"])
    with pytest.raises(SystemExit, match="has no finished run of trc2"):
        script.main()
