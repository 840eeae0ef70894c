"""The step of the learner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import REPLAY, run_folder, study

from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.journal import table

TEXT: dict[str, Any] = {
    "stream": {"class_path": "StdlibText", "init_args": {"block_size": 16, "max_train_tokens": 4000}},
    "architecture": {"class_path": "Transformer", "init_args": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
}


@pytest.mark.parametrize("kind", ["digits", "text"])
def test_the_compiled_step_is_one_graph_and_trains_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = study(strategies={"replay": REPLAY}, architecture__init_args={"hidden_sizes": [16]})
    data |= TEXT if kind == "text" else {}
    plain = run_folder(tmp_path, data, "plain")
    assert execute(plain).status == "FINISHED"
    compiled = run_folder(tmp_path, data | {"training": data["training"] | {"compile": True}}, "compiled")
    # Without code generation, which is the compiler's affair: what is ours is that there is one graph.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    assert execute(compiled).status == "FINISHED", (compiled / "error.txt").read_text()
    states = [Checkpoints(folder, every_seconds=0).load() for folder in (plain, compiled)]
    for name, weight in states[0]["architecture"].items():
        assert torch.allclose(weight, states[1]["architecture"][name], atol=1e-5), name
    assert table(plain).scores()[-1] == pytest.approx(table(compiled).scores()[-1], abs=1e-3, nan_ok=True)


def test_nothing_that_outlives_a_step_stays_in_memory_that_a_replayed_graph_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replayed(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"mode": "reduce-overhead", "dynamic": False}
        results: list[torch.Tensor] = []

        def call(*inputs: Any) -> Any:
            for old in results:
                old.data.fill_(torch.nan)
            seen, output, loss = function(*inputs)
            results[:] = [output.logits, loss]
            return seen, output, loss

        return call

    monkeypatch.setattr(torch, "compile", replayed)
    folder = run_folder(tmp_path, study(strategies={"replay": REPLAY}, training__compile="reduce-overhead"), "graphs")
    assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
    assert table(folder).scores()[-1].min() > 0.1


def test_only_full_batches_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def recorded(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            sizes.append(len(inputs[0]))
            return function(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", recorded)
    data = study(training__compile=True, training__batch_size=100, training__budget={"epochs": 2})
    folder = run_folder(tmp_path, data, "full")
    assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
    # Every pass over a task ends with fewer rows than that.
    assert set(sizes) == {100} and len(sizes) < Checkpoints(folder, every_seconds=0).load()["global_steps"]
