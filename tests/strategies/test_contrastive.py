"""SCR: the contrastive loss against its sum and against Avalanche's, and the two views of every row."""

from __future__ import annotations

import pytest
import torch

from clplat.objective import Objective
from clplat.strategies.contrastive import SCR, supervised_contrastive
from clplat.strategies.toy_run import BATCH, STEPS, ToyRun
from clplat.streams.avalanche_stream import quiet
from clplat.streams.batch import AUXILIARY, CURRENT, REPLAY

PROJECTED = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 3])


def test_the_loss_is_the_sum_of_the_paper_over_rows_whose_class_has_another() -> None:
    z = PROJECTED / PROJECTED.norm(dim=1, keepdim=True)
    rows = []
    for i in range(11):  # row 11 is the only one of its class
        others = [j for j in range(12) if j != i]
        total = sum((z[i] @ z[j] / 0.3).exp() for j in others)
        shares = [((z[i] @ z[j] / 0.3).exp() / total).log() for j in others if LABELS[j] == LABELS[i]]
        rows.append(-sum(shares) / len(shares))
    assert torch.allclose(supervised_contrastive(PROJECTED, LABELS, 0.3), sum(rows) / 11, rtol=1e-12)


def test_loss_and_gradient_are_avalanches_on_two_views() -> None:
    with quiet():
        from avalanche.training.losses import SCRLoss
    views = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 0])
    theirs = SCRLoss(temperature=0.1, base_temperature=0.1)(torch.nn.functional.normalize(views, dim=2), labels)
    ours = supervised_contrastive(views.transpose(0, 1).flatten(0, 1), labels.repeat(2), 0.1)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    pulls = [torch.autograd.grad(loss, views)[0] for loss in (ours, theirs)]
    assert pulls[0].abs().max() > 0.01 and torch.allclose(*pulls, rtol=1e-5, atol=1e-5)


def test_without_any_pair_the_loss_is_zero_and_so_is_its_gradient() -> None:
    alone = PROJECTED[:3].clone().requires_grad_()
    loss = supervised_contrastive(alone, torch.tensor([0, 1, 2]), 0.1)
    loss.backward()
    assert loss == 0 and (alone.grad == 0).all()


def test_mixed_precision_rounds_no_cosine() -> None:
    single, labels = PROJECTED.float(), LABELS
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = supervised_contrastive(single, labels, 0.1)
    assert torch.equal(mixed, supervised_contrastive(single, labels, 0.1))


def test_every_row_stands_twice_in_the_batch_the_second_time_as_an_auxiliary_one() -> None:
    run = ToyRun([SCR(capacity=12, ratio=0.5)], Objective).train(STEPS + 1)
    assert run.mixed.origin.tolist() == [CURRENT] * BATCH + [REPLAY] * 2 + [AUXILIARY] * (BATCH + 2)
    assert torch.equal(run.mixed.inputs[: BATCH + 2], run.mixed.inputs[BATCH + 2 :])
    assert torch.equal(run.mixed.targets[: BATCH + 2], run.mixed.targets[BATCH + 2 :])
    single = ToyRun([SCR(capacity=12, ratio=0.5, second_view=False)], Objective).train(STEPS + 1)
    assert single.mixed.origin.tolist() == [CURRENT] * BATCH + [REPLAY] * 2


def test_rows_of_a_class_draw_together_and_answers_are_those_of_the_nearest_mean() -> None:
    strategy = SCR(capacity=30, ratio=2.0)
    run = ToyRun([strategy], Objective)
    rows = run.path[0].train.batch(torch.arange(12))
    before = supervised_contrastive(run.architecture(rows).logits, rows.targets, 0.1).item()
    run.train(STEPS)
    assert supervised_contrastive(run.architecture(rows).logits, rows.targets, 0.1).item() < before
    with torch.no_grad():
        assert torch.equal(strategy.predict(rows), strategy.nearest.logits(rows))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: must be positive"):
        SCR(capacity=5, temperature=temperature)
