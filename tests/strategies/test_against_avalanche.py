"""Our EWC, MAS, SI, RWalk, LwF, A-GEM, GEM and ER-ACE against Avalanche 0.6.0: the same numbers on the same state.

Plugins are driven by a bare namespace here, not by `AvalanchePlugin`, so that nothing of ours stands between.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clplat.objective import Objective
from clplat.strategies.avalanche_shim import PlainModel, avalanche_dataset, unshared
from clplat.strategies.base import Strategy
from clplat.strategies.distillation import LwF
from clplat.strategies.er_ace import ERACE
from clplat.strategies.path_integral import SI, RWalk
from clplat.strategies.projection import AGEM, GEM
from clplat.strategies.regularization import EWC, MAS, OnlineEWC
from clplat.strategies.toy_run import ROWS, STEPS, ToyRun
from clplat.streams.avalanche_stream import quiet
from clplat.streams.batch import Batch

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def strategy_of(run: ToyRun, task: int, batch_size: int = 4) -> SimpleNamespace:
    """What Avalanche's plugins read of a strategy of its own, around the model of `run`."""
    model, data = PlainModel(run.architecture), run.path[task].train
    with quiet():
        dataset = avalanche_dataset(data.inputs, data.targets)
    return SimpleNamespace(
        model=model, optimizer=run.optimizer, device=torch.device("cpu"), train_mb_size=batch_size,
        _criterion=nn.CrossEntropyLoss(), experience=SimpleNamespace(dataset=dataset),
        clock=SimpleNamespace(train_exp_counter=task), loss=torch.zeros(()),
    )  # fmt: skip


def gradient(run: ToyRun, loss: Tensor, **options: bool) -> Tensor:
    parts = torch.autograd.grad(loss, list(run.architecture.parameters()), **options)
    return torch.cat([part.flatten() for part in parts])


OBSERVED = {"labels": "observed", "fisher_samples": None}
"""Avalanche's Fisher is the empirical one, over all rows of the task."""

EWC_PAIRS = {
    "batches of 5": (EWC, {"fisher": "batch", "fisher_batch_size": 5}, {}, 5),
    "row by row": (EWC, {"fisher": "batch", "fisher_batch_size": 1}, {}, 1),
    # At batch size 1 Avalanche's definition is the paper's: the mean of squared gradients of single rows.
    "the paper's definition": (EWC, {"fisher": "per_sample", "fisher_batch_size": 6}, {}, 1),
    "online": (OnlineEWC, {"fisher": "batch", "fisher_batch_size": 5, "decay": 0.6},
               {"mode": "online", "decay_factor": 0.6}, 5),
}  # fmt: skip


@pytest.mark.parametrize("pair", EWC_PAIRS)
def test_penalty_and_gradient_of_our_ewc_are_avalanches(pair: str) -> None:
    with quiet():
        from avalanche.training.plugins import EWCPlugin
    ours, options, theirs, batch_size = EWC_PAIRS[pair]
    # Avalanche leaves out the half of λ/2.
    plugin = EWCPlugin(ewc_lambda=40.0, **theirs)
    run = ToyRun([ours(strength=80.0, **OBSERVED, **options)], Objective)
    run.optimizer.param_groups[0]["lr"] = 0.01
    for task in range(2):
        run.train((task + 1) * STEPS)
        plugin.after_training_exp(strategy_of(run, task, batch_size))
    run.train(2 * STEPS + 2)
    strategy = strategy_of(run, task=2)
    plugin.before_backward(strategy)
    penalty = run.strategies[0].penalty(None, None)
    assert float(penalty.detach()) > 0.01
    assert torch.allclose(penalty, strategy.loss, **TOLERANCE)
    pull = gradient(run, penalty)
    assert pull.abs().max() > 0.01
    assert torch.allclose(pull, gradient(run, strategy.loss), **TOLERANCE)


class Beside(Strategy):
    """Tells a plugin of Avalanche of every step that the run takes, and adds nothing to it."""

    def __init__(self, plugin) -> None:
        self.plugin = plugin

    def task_start(self, task) -> None:
        self.told = strategy_of(SimpleNamespace(architecture=self.context.architecture, optimizer=self.run.optimizer,
                                                path=self.context.tasks), task.index)  # fmt: skip
        self.tell("before_training", "before_training_exp")

    def batch(self, batch: Batch) -> Batch:
        self.told.mbatch = [batch.inputs, batch.targets, torch.zeros_like(batch.targets)]
        self.told.clock.train_iterations = self.context.step
        self.tell("before_training_iteration")
        return batch

    def step_end(self, outcome) -> None:
        self.tell("after_training_iteration")

    def task_end(self, task) -> None:
        self.tell("after_training_exp")

    def tell(self, *callbacks: str) -> None:
        for callback in callbacks:
            getattr(self.plugin, callback)(self.told)
            unshared(self.plugin)


PAIRS = {
    # c is half of Avalanche's λ.
    "SI": (lambda: SI(strength=1000.0, damping=1e-3, definition="avalanche"),
           ("SynapticIntelligencePlugin", {"si_lambda": 2000.0, "eps": 1e-3})),
    "MAS": (lambda: MAS(strength=2.0, gradients="batch", batch_size=4, average=0.7),
            ("MASPlugin", {"lambda_reg": 2.0, "alpha": 0.7})),
    "RWalk": (lambda: RWalk(strength=1.0, alpha=0.8, interval=5),
              ("RWalkPlugin", {"ewc_lambda": 1.0, "ewc_alpha": 0.8, "delta_t": 5})),
    "RWalk every step": (lambda: RWalk(strength=0.3, interval=1), ("RWalkPlugin", {"ewc_lambda": 0.3, "delta_t": 1})),
    # Avalanche leaves out T².
    "LwF": (lambda: LwF(alpha=0.5, temperature=2.0), ("LwFPlugin", {"alpha": 2.0, "temperature": 2.0})),
    "LwF by task": (lambda: LwF(alpha=[0.0, 1.0, 2.0], temperature=1.0),
                    ("LwFPlugin", {"alpha": [0.0, 1.0, 2.0], "temperature": 1.0})),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # numpy, of Avalanche's SI
@pytest.mark.parametrize("pair", PAIRS)
def test_our_penalty_and_its_gradient_are_those_of_avalanches_plugin(pair: str) -> None:
    with quiet():
        from avalanche.training import plugins
    make, (name, arguments) = PAIRS[pair]
    plugin = getattr(plugins, name)(**arguments)
    beside = Beside(plugin)
    run = ToyRun([make(), beside], Objective)
    beside.run = run
    run.optimizer.param_groups[0]["lr"] = 0.02
    run.train(2 * STEPS + 2)
    batch = run.path[2].train.batch(torch.arange(4))
    output = run.architecture(batch)
    # MAS refuses a loss of 0.
    beside.told.loss, beside.told.mb_x, beside.told.mb_output = torch.ones(()), batch.inputs, output.logits
    plugin.before_backward(beside.told)
    penalty, theirs = run.strategies[0].penalty(output, batch), beside.told.loss - 1
    assert float(penalty.detach()) > 0.005
    assert torch.allclose(penalty, theirs, **TOLERANCE)
    pull = gradient(run, penalty, retain_graph=True)
    assert pull.abs().max() > 0.01
    assert torch.allclose(pull, gradient(run, theirs), **TOLERANCE)


def agem_with_memory(tasks: int):
    """A run that remembers all rows of `tasks` tasks, and Avalanche's plugin with the same memory."""
    with quiet():
        from avalanche.benchmarks.utils.data_loader import GroupBalancedInfiniteDataLoader
        from avalanche.training.plugins import AGEMPlugin
    ours = AGEM(patterns_per_task=ROWS, sample_size=tasks * ROWS)
    run = ToyRun([ours], Objective).train(tasks * STEPS)
    plugin = AGEMPlugin(patterns_per_experience=ROWS, sample_size=tasks * ROWS)
    rows = ours.memory.state_dict()["rows"]
    for task in range(tasks):
        mine = rows["task"] == task
        plugin.buffers.append(avalanche_dataset(rows["inputs"][mine], rows["targets"][mine].long()))
    loader = GroupBalancedInfiniteDataLoader(plugin.buffers, batch_size=ROWS, num_workers=0, pin_memory=False)
    plugin.buffer_dliter = iter(loader)
    return run, ours, plugin


def assert_equal_projections(run: ToyRun, ours: Strategy, plugin: Any, *, task: int, draws: int) -> None:
    """Both leave the same gradient of each of `draws` noisy ones, some of which they change and some not."""
    strategy, parameters = strategy_of(run, task), list(run.architecture.parameters())
    noise, projected, kept = torch.Generator().manual_seed(8), 0, 0
    for number in range(draws):
        batch = run.path[task].train.batch(torch.arange(4) + number % 8)
        plugin.before_training_iteration(strategy)
        # Of each two gradients with opposite signs one opposes the memory and one does not.
        loss = (-1) ** number * run.context.loss(run.architecture(batch), batch)
        before = [own + 0.1 * torch.randn(own.shape, generator=noise) for own in torch.autograd.grad(loss, parameters)]
        results = []
        for project in (ours.gradient, lambda: plugin.after_backward(strategy)):
            for parameter, part in zip(parameters, before):
                parameter.grad = part.clone()
            project()
            results.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        assert torch.allclose(*results, **TOLERANCE)
        changed = not torch.equal(results[1], torch.cat([part.flatten() for part in before]))
        projected, kept = projected + changed, kept + (not changed)
    assert projected and kept


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_gradient_that_our_agem_leaves_is_avalanches(tasks: int) -> None:
    run, ours, plugin = agem_with_memory(tasks)
    assert_equal_projections(run, ours, plugin, task=tasks, draws=12)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_gradient_that_our_gem_leaves_is_avalanches(strength: float) -> None:
    with quiet():
        from avalanche.training.plugins import GEMPlugin
    ours = GEM(patterns_per_task=ROWS, memory_strength=strength)
    run, plugin = ToyRun([ours], Objective).train(2 * STEPS), GEMPlugin(ROWS, strength)
    for task in range(2):
        rows = ours.memory.batch(slice(task * ROWS, (task + 1) * ROWS))
        plugin.memory_x[task], plugin.memory_y[task], plugin.memory_tid[task] = rows.inputs, rows.targets, rows.task
    assert_equal_projections(run, ours, plugin, task=2, draws=24)


def test_once_all_classes_are_seen_our_asymmetric_loss_is_twice_avalanches() -> None:
    with quiet():
        from avalanche.training.regularization import ACECriterion
    run = ToyRun([ERACE(capacity=ROWS)], Objective).train(2 * STEPS + 1)
    output, current = run.architecture(run.mixed), len(run.current)
    logits, targets = output.logits, run.mixed.targets
    losses = [
        run.strategies[0].objective(output, run.mixed),
        2 * ACECriterion()(logits[:current], targets[:current], logits[current:], targets[current:]),
    ]
    assert torch.allclose(*losses, **TOLERANCE)
    ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
    assert ours.abs().max() > 0.01 and torch.allclose(ours, theirs, **TOLERANCE)
