"""iCaRL: the order of exemplars, how they are cut, the loss on old and new classes, and the network before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clplat.objective import Objective
from clplat.strategies.exemplars import exemplars, herded
from clplat.strategies.icarl import iCaRL
from clplat.strategies.toy_run import CLASSES, ROWS, STEPS, ToyRun
from clplat.streams.avalanche_stream import quiet


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=1, keepdim=True)


def test_each_exemplar_is_the_one_that_brings_their_mean_nearest_to_the_mean_of_all() -> None:
    features = unit(torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    chosen: list[int] = []
    for number in range(1, 16):
        sums = sum((features[row] for row in chosen), torch.zeros(6, dtype=torch.float64))
        gaps = [(features.mean(0) - (features[row] + sums) / number).norm() for row in range(40)]
        chosen.append(min((row for row in range(40) if row not in chosen), key=gaps.__getitem__))
    assert herded(features, 15).tolist() == chosen
    assert sorted(herded(features, 99).tolist()) == list(range(40))


def test_exemplars_of_a_class_are_a_shrinking_head_of_its_order() -> None:
    strategy = iCaRL(capacity=9)
    run = ToyRun([strategy], Objective)
    orders: dict[int, list[int]] = {}
    for task in run.path:
        run.train((task.index + 1) * STEPS)
        rows, ranks = exemplars(strategy.context, task, strategy.buffer.capacity)
        labels = task.train.batch(rows).targets
        for label in task.classes:
            own = labels == label
            assert ranks[own].tolist() == list(range(int(own.sum())))
            orders[label] = task.train.batch(rows[own]).inputs.tolist()
        kept = strategy.buffer.batch()
        counts = kept.targets.bincount(minlength=CLASSES)[: len(orders)]
        assert counts.sum() == 9 and counts.max() - counts.min() <= 1
        for label, order in orders.items():
            mine = kept.inputs[kept.targets == label].tolist()
            assert sorted(mine) == sorted(order[: len(mine)])


def test_the_loss_holds_old_classes_to_old_answers_and_new_ones_to_labels() -> None:
    strategy = iCaRL(capacity=12)
    run = ToyRun([strategy], Objective).train(STEPS)
    before = {name: tensor.clone() for name, tensor in run.architecture.state_dict().items()}
    run.train(STEPS + 2)
    output, batch = run.architecture(run.mixed), run.mixed
    old = torch.func.functional_call(run.architecture, before, (batch,)).logits.double().sigmoid()
    total = 0.0
    for row in range(len(batch)):
        for unit_number in range(4):  # classes 4 and 5 have not been met
            chance = output.logits[row, unit_number].double().sigmoid()
            wanted = old[row, unit_number] if unit_number < 2 else float(batch.targets[row] == unit_number)
            total = total - wanted * chance.log() - (1 - wanted) * (1 - chance).log()
    assert torch.allclose(strategy.objective(output, batch).double(), total / len(batch), rtol=1e-6)


def test_in_the_first_task_the_loss_is_binary_cross_entropy_on_the_classes_met() -> None:
    strategy = iCaRL(capacity=12)
    run = ToyRun([strategy], Objective).train(1)
    logits = run.architecture(run.mixed).logits
    wanted = F.one_hot(run.mixed.targets, CLASSES).float()
    expected = F.binary_cross_entropy_with_logits(logits[:, :2], wanted[:, :2]) * 2
    assert torch.allclose(strategy.objective(run.architecture(run.mixed), run.mixed), expected)


def test_once_all_classes_are_met_loss_and_gradient_are_avalanches_times_their_number() -> None:
    with quiet():
        from avalanche.training.losses import ICaRLLossPlugin
    strategy = iCaRL(capacity=12)
    run = ToyRun([strategy], Objective).train(2 * STEPS + 2)
    output, batch = run.architecture(run.mixed), run.mixed
    plugin = ICaRLLossPlugin()
    plugin.old_classes, plugin.old_logits = [0, 1, 2, 3], strategy.previous(batch).logits
    losses = [strategy.objective(output, batch), CLASSES * plugin(output.logits, batch.targets)]
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-5)
    pulls = [torch.autograd.grad(loss, output.logits, retain_graph=True)[0] for loss in losses]
    assert pulls[0].abs().max() > 0.01 and torch.allclose(*pulls, rtol=1e-5, atol=1e-5)


def test_replayed_rows_count_by_their_weight() -> None:
    strategy = iCaRL(capacity=12, weight=0.25)
    run = ToyRun([strategy], Objective).train(STEPS + 1)
    output, batch = run.architecture(run.mixed), run.mixed
    halves = [strategy.objective(run.architecture(part), part.replaced(weight=None))
              for part in (batch.rows(slice(0, 4)), batch.rows(slice(4, 8)))]  # fmt: skip
    assert torch.allclose(strategy.objective(output, batch), (halves[0] + 0.25 * halves[1]) / 1.25)


def test_the_network_before_stays_as_it_was_while_the_model_goes_on() -> None:
    strategy = iCaRL(capacity=12)
    run = ToyRun([strategy], Objective).train(STEPS)
    before = run.weights()
    run.train(2 * STEPS - 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in strategy.previous.state_dict().items())
    assert not any(parameter.requires_grad for parameter in strategy.previous.parameters())
    assert not torch.equal(run.weights()["head.weight"], before["head.weight"])


def test_answers_come_from_exemplars_and_a_task_that_has_not_ended_has_none() -> None:
    strategy = iCaRL(capacity=2 * ROWS)
    run = ToyRun([strategy], Objective)
    rows, answers = run.path[1].train.batch(torch.arange(ROWS)), []
    for stop in (STEPS + 2, 2 * STEPS):
        run.train(stop)
        with torch.no_grad():
            answers.append(set(strategy.predict(rows).argmax(1).tolist()))
    assert answers[0] <= {0, 1} and answers[1] & {2, 3}


def test_tasks_that_share_classes_are_refused() -> None:
    run = ToyRun([], Objective)
    tasks = [run.path[0], run.path[0]]
    run.context.tasks = tasks
    with pytest.raises(ValueError, match="iCaRL: tasks share classes"):
        iCaRL(capacity=5).setup(run.context)
