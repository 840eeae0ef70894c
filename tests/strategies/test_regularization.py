"""EWC and MAS: importances against their definitions, penalties against their formulas, EWC against Avalanche."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.transformer import Transformer
from clplat.objective import Objective
from clplat.strategies.fisher import fisher_diagonal
from clplat.strategies.regularization import EWC, MAS, OnlineEWC
from clplat.strategies.toy_run import ROWS, STEPS, ToyRun
from clplat.strategies.weights import flat_parameters
from clplat.streams.avalanche_stream import quiet
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch


def in_doubles(kind="classify") -> ToyRun:
    run = ToyRun([], Objective, kind)
    run.architecture.double()
    for task in run.path:
        if kind == "classify":
            task.train.inputs = task.train.inputs.double()
    return run


def gradient(run: ToyRun, loss: Tensor) -> Tensor:
    parameters = list(run.architecture.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("kind", ["classify", "language"])
def test_the_empirical_fisher_is_the_mean_of_squared_row_gradients(kind: str, batch_size: int) -> None:
    run = in_doubles(kind)
    task = run.path[1]
    fisher = fisher_diagonal(
        run.context, task, samples=None, labels="observed", batch_size=batch_size, per_sample=True
    )  # fmt: skip
    expected = torch.zeros_like(fisher)
    for row in range(ROWS):
        batch = task.train.batch(torch.tensor([row]))
        logits = run.architecture(batch).logits
        expected += gradient(run, F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())).square() / ROWS
    assert torch.allclose(fisher, expected, rtol=1e-12, atol=1e-18)


def test_labels_are_drawn_from_the_models_own_answers() -> None:
    run = in_doubles()
    task = run.path[0]
    options = {"samples": None, "labels": "sampled", "batch_size": ROWS, "per_sample": True}
    draws = torch.stack([fisher_diagonal(run.context, task, **options) for _ in range(300)])
    expected = torch.zeros_like(draws[0])
    for row in range(ROWS):
        logits = run.architecture(task.train.batch(torch.tensor([row]))).logits[0]
        for label, chance in enumerate(logits.softmax(-1)):
            expected += chance.detach() * gradient(run, -logits.log_softmax(-1)[label]).square() / ROWS
    error = (draws.mean(0) - expected) / (draws.std(0) / 300**0.5)
    assert error.abs().max() < 4.5
    assert 0.5 < error.square().mean() < 1.6


def test_predicted_labels_are_the_likeliest_answers() -> None:
    run = in_doubles()
    task = run.path[0]
    with torch.no_grad():
        likeliest = run.architecture(task.train.batch(torch.arange(ROWS))).logits.argmax(-1)
    assert not torch.equal(likeliest, task.train.targets)
    options = {"samples": None, "batch_size": 4, "per_sample": True}
    predicted = fisher_diagonal(run.context, task, labels="predicted", **options)
    task.train.targets.copy_(likeliest)
    assert torch.equal(predicted, fisher_diagonal(run.context, task, labels="observed", **options))


def test_hidden_classes_are_never_drawn() -> None:
    run = in_doubles()
    run.context.masked = lambda output, batch: output.logits.masked_fill(torch.arange(6) > 0, float("-inf"))
    task = run.path[0]
    task.train.targets.zero_()
    options = {"samples": None, "batch_size": 4, "per_sample": True}
    drawn = fisher_diagonal(run.context, task, labels="sampled", **options)
    assert torch.equal(drawn, fisher_diagonal(run.context, task, labels="observed", **options))


def test_a_row_without_targets_adds_nothing() -> None:
    run = in_doubles("language")
    task = run.path[0]
    options = {"samples": None, "labels": "observed", "batch_size": 6, "per_sample": True}
    task.train.targets[6:] = IGNORE
    half = fisher_diagonal(run.context, task, **options)
    assert bool(half.isfinite().all())
    task.train.inputs, task.train.targets = task.train.inputs[:6], task.train.targets[:6]
    assert torch.allclose(2 * half, fisher_diagonal(run.context, task, **options), rtol=1e-12)


def test_the_fisher_is_taken_without_dropout_and_every_part_keeps_its_mode() -> None:
    run = ToyRun([], Objective)
    run.architecture.first = nn.Sequential(run.architecture.first, nn.Dropout(0.5))
    run.architecture.first[0].eval()
    options = {"samples": None, "labels": "observed", "batch_size": 4, "per_sample": True}
    first = fisher_diagonal(run.context, run.path[0], **options)
    assert torch.equal(first, fisher_diagonal(run.context, run.path[0], **options))
    assert run.architecture.training and run.architecture.first[1].training
    assert not run.architecture.first[0].training


def test_the_transformer_gives_row_gradients_at_once_and_one_by_one() -> None:
    run = ToyRun([], Objective, "language")
    spec = Spec(kind="language", input_shape=(5,), num_outputs=7)
    run.context.architecture = Transformer(spec=spec, hidden_size=16, num_layers=1, num_heads=2)
    at_once, one_by_one = (
        fisher_diagonal(run.context, run.path[0], samples=None, labels="observed", batch_size=size, per_sample=True)
        for size in (6, 1)
    )
    assert torch.allclose(at_once, one_by_one, rtol=1e-3, atol=1e-9)


def test_ewc_is_the_sum_of_one_quadratic_a_task_and_online_ewc_one_around_the_latest() -> None:
    source = torch.Generator().manual_seed(4)
    strategies = EWC(strength=3.0), OnlineEWC(strength=3.0, decay=0.7)
    run = ToyRun(strategies, Objective)
    run.architecture.double()
    now = flat_parameters(run.architecture)
    anchors = [torch.randn(len(now), generator=source, dtype=torch.float64) for _ in range(3)]
    fishers = [torch.rand(len(now), generator=source, dtype=torch.float64) for _ in range(3)]
    fishers[0][:5] = fishers[1][:5] = 0
    for anchor, fisher in zip(anchors, fishers):
        for strategy in strategies:
            strategy.consolidate(fisher, anchor)
    separate = sum((f * (now - a).square()).sum() for f, a in zip(fishers, anchors))
    running = 0.7 * (0.7 * fishers[0] + fishers[1]) + fishers[2]
    for strategy, expected in zip(strategies, (separate, (running * (now - anchors[2]).square()).sum())):
        penalty = strategy.penalty(None, None)
        assert torch.allclose(penalty, 1.5 * expected, rtol=1e-12)
        assert torch.allclose(gradient(run, penalty), gradient(run, 1.5 * expected), rtol=1e-12)


def test_the_batch_fisher_and_its_penalty_are_avalanches() -> None:
    run, plugin = avalanche_after_two_tasks()
    strategy = run.strategies[0]
    fisher = sum(torch.cat([value.data.flatten() for value in one.values()]) for one in plugin.importances.values())
    assert torch.allclose(strategy.importance, fisher, rtol=1e-5, atol=1e-9)
    shim = shim_of(run, task=2)
    plugin.before_backward(shim)
    assert torch.allclose(strategy.penalty(None, None), shim.loss, rtol=1e-5)


def avalanche_after_two_tasks():
    """A run with our EWC, and Avalanche's plugin told of the same model at the same boundaries."""
    with quiet():
        from avalanche.training.plugins import EWCPlugin
    options = {"fisher": "batch", "labels": "observed", "fisher_samples": None, "fisher_batch_size": 5}
    run = ToyRun([EWC(strength=0.8, **options)], Objective)
    plugin = EWCPlugin(ewc_lambda=0.4)  # Avalanche leaves the half out
    for task in range(2):
        run.train((task + 1) * STEPS)
        plugin.after_training_exp(shim_of(run, task))
    run.train(2 * STEPS + 2)
    return run, plugin


def shim_of(run: ToyRun, task: int) -> SimpleNamespace:
    """What Avalanche's plugin reads of a strategy of its own."""
    data = run.path[task].train
    rows = [(data.inputs[i], int(data.targets[i]), 0) for i in range(len(data))]
    return SimpleNamespace(
        model=_Plain(run), _criterion=nn.CrossEntropyLoss(), optimizer=run.optimizer, device="cpu", train_mb_size=5,
        experience=SimpleNamespace(dataset=rows), clock=SimpleNamespace(train_exp_counter=task), loss=torch.zeros(()),
    )  # fmt: skip


class _Plain(nn.Module):
    """The toy model as Avalanche calls one: a tensor in, logits out."""

    def __init__(self, run: ToyRun) -> None:
        super().__init__()
        self.inner = run.architecture

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(Batch(inputs=inputs, targets=inputs)).logits


def test_a_model_that_allows_no_row_gradients_at_once_is_refused_before_training() -> None:
    class Stubborn(nn.Module):
        def forward(self, batch: Batch):
            assert float(batch.inputs.sum()) == float(batch.inputs.sum())
            return run.architecture(batch)

    run = ToyRun([], Objective)
    stubborn = Stubborn()
    stubborn.inner = run.architecture
    run.context.architecture = stubborn
    with pytest.raises(ValueError, match=r"EWC\.fisher_batch_size: Stubborn .*set it to 1"):
        EWC(strength=1.0).setup(run.context)
    one_by_one = EWC(strength=1.0, fisher_batch_size=1)
    one_by_one.setup(run.context)
    one_by_one.task_end(run.path[0])
    assert bool((one_by_one.importance > 0).any())


def test_a_model_that_grows_between_tasks_is_refused_by_name() -> None:
    run = ToyRun([OnlineEWC(strength=1.0)], Objective).train(STEPS)
    run.architecture.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="OnlineEWC: the architecture went from"):
        run.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": -1.0}, "strength"), ({"strength": 1.0, "fisher_batch_size": 0}, "fisher_batch_size"),
     ({"strength": 1.0, "decay": 1.5}, "decay")],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineEWC(**options)


def test_weights_move_less_where_the_fisher_is_large() -> None:
    free, held = ToyRun([], Objective), ToyRun([EWC(strength=300.0, fisher_samples=None)], Objective)
    moved = []
    for run in (free, held):
        run.train(STEPS)
        start = flat_parameters(run.architecture).detach().clone()
        run.optimizer.param_groups[0]["lr"] = 0.02
        run.train(2 * STEPS)
        moved.append((flat_parameters(run.architecture) - start).abs().detach())
    importance = held.strategies[0].importance
    important = importance > importance.quantile(0.9)
    assert moved[1][important].mean() < 0.5 * moved[0][important].mean()


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("kind", ["classify", "language"])
def test_mas_weighs_by_the_mean_absolute_gradient_of_the_squared_length_of_each_rows_answer(
    kind: str, batch_size: int
) -> None:
    run = in_doubles(kind)
    mas = MAS(strength=3.0, batch_size=batch_size)
    mas.setup(run.context)
    expected = torch.zeros_like(flat_parameters(run.architecture))
    for task in run.path[:2]:
        mas.task_end(task)
        for row in range(ROWS):
            logits = run.architecture(task.train.batch(torch.tensor([row]))).logits
            expected += gradient(run, logits.square().sum() / logits[..., 0].numel()).abs() / ROWS
        with torch.no_grad():
            run.architecture.head.weight += 0.1
    assert torch.allclose(mas.importance, expected.detach(), rtol=1e-10, atol=1e-14)
    moved = flat_parameters(run.architecture) - mas.anchor
    assert float(moved.detach().abs().max()) == pytest.approx(0.1)
    assert torch.allclose(mas.penalty(None, None), 3.0 * (expected * moved.square()).sum(), rtol=1e-10)


def test_mas_measures_only_the_classes_of_the_task_where_others_are_hidden() -> None:
    run = in_doubles()
    hidden = torch.arange(6) > 1
    run.context.masked = lambda output, batch: output.logits.masked_fill(hidden, float("-inf"))
    mas = MAS(strength=1.0)
    mas.setup(run.context)
    mas.task_end(run.path[0])
    head = mas.importance[-6 * 9 :]
    assert bool((head[:16] > 0).all()) and bool((head[16:48] == 0).all())
    assert bool((head[48:50] > 0).all()) and bool((head[50:] == 0).all())


def test_mas_adds_importances_or_averages_them() -> None:
    single = []
    for task in (0, 1):
        mas = MAS(strength=1.0)
        run = ToyRun([mas], Objective)
        mas.task_end(run.path[task])
        single.append(mas.importance)
    for average, expected in ((None, single[0] + single[1]), (0.3, 0.3 * single[0] + 0.7 * single[1])):
        mas = MAS(strength=1.0, average=average)
        run = ToyRun([mas], Objective)
        for task in (0, 1):
            mas.task_end(run.path[task])
        assert torch.allclose(mas.importance, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": -1.0}, "strength"), ({"strength": 1.0, "batch_size": 0}, "samples, batch_size"),
     ({"strength": 1.0, "samples": 0}, "samples, batch_size"), ({"strength": 1.0, "average": 1.5}, "average")],
)  # fmt: skip
def test_wrong_options_of_mas_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: "):
        MAS(**options)
