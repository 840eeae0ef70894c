"""Avalanche's plugins in whole runs: Lightning's step between the callbacks, interruptions inside tasks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from studies import run_folder, study
from torch import nn

from clplat.checkpoint import Checkpoints
from clplat.execution import execute
from clplat.learner import Learner
from clplat.strategies.avalanche_shim import PlainModel, avalanche_dataset
from clplat.streams.avalanche_stream import quiet


def plugin(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "AvalanchePlugin", "init_args": {"plugin": name, "arguments": arguments}}


SI = plugin("SynapticIntelligencePlugin", si_lambda=100.0)
SEVERAL = {
    "si": SI,
    "lwf": plugin("LwFPlugin", alpha=1.0, temperature=2.0),
    "agem": plugin("AGEMPlugin", patterns_per_experience=20, sample_size=10),
}


@pytest.mark.parametrize("step", [5, 17, 30])
def test_a_run_stopped_inside_a_task_and_resumed_equals_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    assert_resumes_as_if_never_stopped(study(strategies=SEVERAL), step=step, folder=tmp_path)


def test_a_whole_run_with_si_ends_with_the_weights_of_avalanches_own_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[int, list[Any]] = {}
    original, models = Learner.training_step, []

    def training_step(self: Learner, batch: Any, number: int) -> None:
        if not models:
            models.append(PlainModel(self.architecture).state_dict())
            models[0] = {name: tensor.clone() for name, tensor in models[0].items()}
        batches.setdefault(int(batch.task[0]), []).append(batch)
        original(self, batch, number)

    monkeypatch.setattr(Learner, "training_step", training_step)
    data = study(strategies={"si": SI}, architecture__init_args__dropout=0.0)
    data["training"]["optimizer"]["init_args"] = {"lr": 0.1}
    folder = run_folder(tmp_path, data)
    execute(folder)
    state = Checkpoints(folder, every_seconds=0).load()
    expected, importances = avalanches_si(models[0], list(batches.values()), monkeypatch)
    assert importances > 0
    for name, tensor in state["architecture"].items():
        assert torch.allclose(tensor, expected[f"architecture.{name}"], rtol=1e-5, atol=1e-5), name


def avalanches_si(
    weights: dict[str, torch.Tensor], tasks: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], float]:
    """Weights with which Avalanche's own loop ends on the same batches, and the largest of SI's importances."""
    from clplat.architectures.mlp import MLP
    from clplat.streams.base import Spec

    with quiet():
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.training.plugins import SynapticIntelligencePlugin
        from avalanche.training.supervised import Naive

    @torch.no_grad()
    def extract_weights(model: nn.Module, target: dict, excluded: set) -> None:
        # As on a GPU: on the CPU Avalanche keeps views of the live weights, and SI does nothing.
        for name, parameter in SynapticIntelligencePlugin.allowed_parameters(model, excluded):
            target[name].data = parameter.detach().flatten().clone()

    monkeypatch.setattr(SynapticIntelligencePlugin, "extract_weights", staticmethod(extract_weights))
    spec = Spec(kind="classify", input_shape=(1, 8, 8), num_outputs=6, scenario="class")
    model = PlainModel(MLP(spec=spec, hidden_sizes=[32]))
    model.load_state_dict(weights)
    si = SynapticIntelligencePlugin(si_lambda=100.0)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No loggers specified", UserWarning)
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
            train_mb_size=16, plugins=[si], evaluator=None,
        )  # fmt: skip
        data = [
            avalanche_dataset(*(torch.cat([getattr(b, part) for b in task]) for part in ("inputs", "targets")))
            for task in tasks
        ]
        for experience in benchmark_from_datasets(train=data).train_stream:
            strategy.train(experience, shuffle=False, eval_streams=[])
    return model.state_dict(), max(float(kept.data.max()) for kept in si.ewc_data[1].values())
