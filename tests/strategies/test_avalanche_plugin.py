"""Avalanche's plugins in our loop: the weights of Avalanche's own loop, resumable, refused where they cannot run."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clplat.objective import Objective
from clplat.strategies.avalanche_plugin import REFUSED, AvalanchePlugin
from clplat.strategies.avalanche_shim import PlainModel, avalanche_dataset
from clplat.strategies.avalanche_state import SeededDraws
from clplat.strategies.contract import (
    check_composition,
    check_disabled,
    check_knobs,
    check_randomness,
    check_resume,
    check_storage,
)
from clplat.strategies.toy_run import BATCH, ROWS, STEPS, TASKS, ToyRun
from clplat.strategies.world import World
from clplat.streams.avalanche_stream import named, quiet, seeded
from clplat.streams.base import Spec

PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "EWC": ("EWCPlugin", {"ewc_lambda": 2.0}),
    "EWC online": ("EWCPlugin", {"ewc_lambda": 2.0, "mode": "online", "decay_factor": 0.5}),
    "SI": ("SynapticIntelligencePlugin", {"si_lambda": [0.0, 1000.0]}),
    "MAS": ("MASPlugin", {"lambda_reg": 0.5, "alpha": 0.3}),
    "LwF": ("LwFPlugin", {"alpha": [0.0, 1.0, 2.0], "temperature": 2}),
    "GEM": ("GEMPlugin", {"patterns_per_experience": 8, "memory_strength": 0.1}),
    "A-GEM": ("AGEMPlugin", {"patterns_per_experience": 8, "sample_size": 5}),
    "RWalk": ("RWalkPlugin", {"ewc_lambda": 0.5, "delta_t": 2}),
}
EPOCHS = 2


def ours(name: str) -> AvalanchePlugin:
    plugin, arguments = PLUGINS[name]
    return AvalanchePlugin(plugin=plugin, arguments=copy.deepcopy(arguments))


class InOrder(ToyRun):
    """The toy run with every task's rows in order, two epochs of three batches."""

    def train(self, stop: int | None = None) -> ToyRun:
        for position, task in enumerate(self.path):
            self.context.task, self.context.past = task, self.path[:position]
            for strategy in self.having("task_start"):
                strategy.task_start(task)
            for rows in list(torch.arange(ROWS).split(BATCH)) * EPOCHS:
                self._step(task.train.batch(rows))
            for strategy in self.having("task_end"):
                strategy.task_end(task)
        return self


def seeds() -> Iterator[int]:
    """What our adapter draws from the run's `strategy` source: as a task starts, and as it ends."""
    source = torch.Generator().manual_seed(2)
    while True:
        yield int(torch.randint(2**62, (), generator=source))


def avalanches(name: str) -> dict[str, Tensor]:
    """Weights that Avalanche's own strategy ends with, its plugin's draws at task ends seeded as ours."""
    plugin_name, arguments = PLUGINS[name]
    drawn = seeds()

    class Seeded(named(plugin_name, "avalanche.training.plugins", "plugin")):
        def after_training_exp(self, strategy, **options) -> None:
            next(drawn)
            seed = next(drawn)
            with seeded(seed):
                super().after_training_exp(strategy, **options)
            if plugin_name == "AGEMPlugin":
                self.buffer_dliter = SeededDraws(self.buffer_dataloader, seed)

    with quiet():
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.training.supervised import Naive
    run = ToyRun([], Objective)
    model = PlainModel(run.architecture)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No loggers specified", UserWarning)
        strategy = Naive(
            model=model, optimizer=run.optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH,
            train_epochs=EPOCHS, plugins=[Seeded(**copy.deepcopy(arguments))], evaluator=None,
        )  # fmt: skip
        data = [avalanche_dataset(task.train.inputs, task.train.targets) for task in run.path]
        for experience in benchmark_from_datasets(train=data).train_stream:
            strategy.train(experience, shuffle=False, eval_streams=[])
    return run.weights()


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Avalanche's SI copy the weights that it remembers, which on the CPU it does not."""
    with quiet():
        from avalanche.training.plugins import SynapticIntelligencePlugin as SI

    @torch.no_grad()
    def extract_weights(model, target, excluded) -> None:
        for name, parameter in SI.allowed_parameters(model, excluded):
            target[name].data = parameter.detach().flatten().clone()

    monkeypatch.setattr(SI, "extract_weights", staticmethod(extract_weights))


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_gives_the_weights_that_it_gives_in_avalanches_own_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = InOrder([ours(name)], Objective).train().weights()
    if name == "SI":
        as_on_a_gpu(monkeypatch)
    expected, naive = avalanches(name), InOrder([], Objective).train().weights()
    for key, tensor in weights.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-5, atol=1e-5), key
    assert max((tensor - naive[key]).abs().max() for key, tensor in weights.items()) > 1e-3, "it does nothing"


def test_avalanches_own_si_does_nothing_on_the_cpu() -> None:
    """Why `unshared` is there; when this fails, Avalanche has mended it, and `unshared` can go."""
    expected = InOrder([], Objective).train().weights()
    for key, tensor in avalanches("SI").items():
        assert torch.allclose(tensor, expected[key], atol=1e-6)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_keeps_the_contract_of_strategies(name: str) -> None:
    for check in (check_resume, check_randomness, check_storage, check_composition):
        check(lambda: ours(name), Objective)
    check_knobs(lambda: ours(name))


@pytest.mark.parametrize(
    ("plugin", "arguments"),
    [("EWCPlugin", {"ewc_lambda": 0.0}), ("SynapticIntelligencePlugin", {"si_lambda": 0.0}),
     ("MASPlugin", {"lambda_reg": 0.0}), ("LwFPlugin", {"alpha": 0.0})],
)  # fmt: skip
def test_a_penalty_of_weight_zero_changes_no_bit(plugin: str, arguments: dict) -> None:
    check_disabled(lambda: AvalanchePlugin(plugin=plugin, arguments=arguments), Objective, {})


def test_every_plugin_that_avalanche_exports_is_run_or_refused_before_training() -> None:
    with quiet():
        import avalanche.training.plugins as exported
    base = exported.SupervisedPlugin
    known = {name for name, found in vars(exported).items() if isinstance(found, type) and issubclass(found, base)}
    running = {plugin for plugin, _ in PLUGINS.values()}
    refused = set()
    for name in known - running - {"SupervisedPlugin"}:
        with pytest.raises(ValueError, match=rf"(plugin|arguments): {name}"):
            ToyRun([AvalanchePlugin(plugin=name)], Objective)
            pytest.fail(f"{name} is neither run nor refused")
        refused.add(name)
    assert running | refused | {"SupervisedPlugin"} == known and len(refused) > 15


@pytest.mark.parametrize("name", REFUSED)
def test_plugins_that_own_the_loop_are_refused_by_name_without_importing_avalanche(name: str) -> None:
    for path in (name, f"avalanche.training.plugins.{name}"):
        with pytest.raises(ValueError, match=rf"plugin: {name} .*which our loop owns; (use|penalty)"):
            AvalanchePlugin(plugin=path)


def test_avalanche_is_not_imported_before_setup() -> None:
    code = (
        "import sys\nfrom clplat.strategies.avalanche_plugin import AvalanchePlugin\n"
        "AvalanchePlugin(plugin='EWCPlugin')\nsys.exit('avalanche' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def own_plugin(**members):
    """A plugin of one's own, to be named by import path."""
    with quiet():
        from avalanche.training.plugins import SupervisedPlugin
    globals()["Own"] = type("Own", (SupervisedPlugin,), members)
    return AvalanchePlugin(plugin=f"{__name__}.Own")


def test_a_penalty_of_ones_own_runs_and_keeps_its_state() -> None:
    def __init__(self) -> None:
        self.seen = {}

    def before_backward(self, strategy, **options) -> None:
        self.seen[strategy.experience.current_experience] = strategy.clock.train_iterations
        strategy.loss += 0.1 * sum(p.square().sum() for p in strategy.model.parameters())

    check_resume(lambda: own_plugin(__init__=__init__, before_backward=before_backward), Objective)
    strategy = own_plugin(__init__=__init__, before_backward=before_backward)
    ToyRun([strategy], Objective).train()
    assert strategy.plugin.seen == {index: (index + 1) * STEPS - 1 for index in range(TASKS)}


def test_a_plugin_that_sets_what_belongs_to_the_loop_is_stopped_before_the_first_step() -> None:
    def before_training_exp(self, strategy, **options) -> None:
        strategy.dataloader = []

    run = ToyRun([own_plugin(before_training_exp=before_training_exp)], Objective)
    with pytest.raises(ValueError, match=r"Own: sets strategy\.dataloader"):
        run.train()
    assert run.context.step == 0


@pytest.mark.parametrize("callback", ["after_train_dataset_adaptation", "before_training_epoch", "after_eval_forward"])
def test_callbacks_that_our_loop_has_no_place_for_are_refused_by_name(callback: str) -> None:
    with pytest.raises(ValueError, match=f"Own defines {callback}, which need"):
        ToyRun([own_plugin(**{callback: lambda self, strategy, **options: None})], Objective)


def test_state_that_no_checkpoint_can_keep_is_refused_before_training() -> None:
    def __init__(self) -> None:
        self.helper = object()

    with pytest.raises(ValueError, match=r"Own\.helper is a object, which a checkpoint cannot keep"):
        ToyRun([own_plugin(__init__=__init__)], Objective)


def test_language_and_several_processes_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="on language use a strategy of our own"):
        ToyRun([ours("EWC")], Objective, "language")
    with pytest.raises(ValueError, match=r"one process only; set training.devices to 1"):
        ToyRun([ours("EWC")], Objective, world=World(rank=0, size=2))


@pytest.mark.parametrize(
    ("plugin", "arguments", "message"),
    [("EWC", {}, "has no 'EWC'; give a name from avalanche.training.plugins"),
     ("EWCPlugin", {"strength": 1.0}, "arguments: EWCPlugin does not take"),
     ("EWCPlugin", {"ewc_lambda": 1.0, "mode": "online"}, "arguments: .*decay_factor"),
     ("AGEMPlugin", {"patterns_per_experience": 3, "sample_size": 2}, r"arguments\.sample_size: .* give 3 or more"),
     ("collections.OrderedDict", {}, "must inherit from SupervisedPlugin")],
)  # fmt: skip
def test_wrong_names_and_arguments_are_refused_before_training(plugin: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyRun([AvalanchePlugin(plugin=plugin, arguments=arguments)], Objective)


def test_in_the_task_scenario_a_plugins_loss_is_among_the_classes_of_each_rows_task() -> None:
    run = ToyRun([], Objective)
    spec = Spec(kind="classify", input_shape=(5,), num_outputs=6, scenario="task")
    run.context.spec, run.context.loss = spec, Objective(spec, run.path)
    strategy = ours("EWC")
    strategy.setup(run.context)
    logits, targets = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5])
    expected = -(logits[0, :2].log_softmax(0)[0] + logits[1, 4:].log_softmax(0)[1]) / 2
    assert torch.allclose(strategy._criterion(logits, targets), expected)


def test_accumulated_batches_are_one_iteration_and_keep_their_gradients() -> None:
    strategy = ours("A-GEM")
    run = ToyRun([strategy], Objective).train(STEPS)
    parameter = next(run.architecture.parameters())
    parameter.grad = torch.ones_like(parameter)
    drawn = strategy.draws.drawn
    for _ in range(2):
        strategy.batch(run.path[1].train.batch(torch.arange(BATCH)))
    assert strategy.draws.drawn == drawn + 1
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_after_resuming_agem_draws_the_rows_that_it_would_have_drawn() -> None:
    strategies = [ours("A-GEM"), ours("A-GEM")]
    whole = ToyRun(strategies[:1], Objective).train(STEPS + 2)
    ToyRun(strategies[1:], Objective).load(whole.saved())
    drawn = [[next(strategy.draws)[0] for _ in range(4)] for strategy in strategies]
    assert all(map(torch.equal, *drawn)) and not torch.equal(drawn[0][0], drawn[0][1])
    assert strategies[0].draws.drawn == strategies[1].draws.drawn == 2 + 4
