"""ER-ACE: which classes each row's softmax runs over, and what that does to gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from clplat.objective import Objective
from clplat.strategies.er_ace import ERACE
from clplat.strategies.toy_run import BATCH, STEPS, ToyRun
from clplat.streams.batch import IGNORE, REPLAY


def in_task(number: int, **options) -> ToyRun:
    """A run one step into its task `number`."""
    return ToyRun([ERACE(capacity=12, **options)], Objective).train((number - 1) * STEPS + 1)


def test_the_loss_is_that_of_each_part_among_its_own_classes() -> None:
    run = in_task(2, ratio=1.5, weight=0.3)
    logits, targets = run.architecture(run.mixed).logits.double(), run.mixed.targets
    present = targets[:BATCH].unique().tolist()
    assert set(present) <= {2, 3} and set(targets[BATCH:].tolist()) <= {0, 1, 2, 3}
    current = torch.stack([logits[row, present].logsumexp(0) - logits[row, targets[row]] for row in range(BATCH)])
    replayed = F.cross_entropy(logits[BATCH:, :4], targets[BATCH:])
    loss = run.strategies[0].objective(replace(run.architecture(run.mixed), logits=logits), run.mixed)
    assert torch.allclose(loss.double(), current.mean() + 0.3 * replayed, rtol=1e-6)


def test_current_rows_move_no_logit_of_another_class_and_no_row_one_of_a_class_not_seen() -> None:
    run = in_task(2)
    output = run.architecture(run.mixed)
    (pull,) = torch.autograd.grad(run.strategies[0].objective(output, run.mixed), output.logits)
    current, replayed = pull[:BATCH], pull[BATCH:]
    assert (current[:, [0, 1]] == 0).all() and (pull[:, [4, 5]] == 0).all()
    assert (current[:, [2, 3]] != 0).any() and (replayed[:, [0, 1]] != 0).all()


def test_a_class_of_the_task_that_is_not_in_the_batch_is_left_alone_by_current_rows() -> None:
    run = in_task(2)
    rows = run.path[1].train.batch(torch.tensor([0, 2, 4]))
    assert rows.targets.tolist() == [2, 2, 2]
    other = run.path[0].train.batch(torch.tensor([0, 1])).with_origin(REPLAY)
    batch = rows.joined(other)
    output = run.architecture(batch)
    (pull,) = torch.autograd.grad(run.strategies[0].objective(output, batch), output.logits)
    assert (pull[:3] == 0).all() and (pull[3:, :4] != 0).all()


def test_without_replayed_rows_the_loss_is_the_default_one() -> None:
    run = in_task(1)
    assert run.mixed.origin is None
    output = run.architecture(run.mixed)
    assert torch.equal(
        run.strategies[0].objective(output, run.mixed), F.cross_entropy(output.logits, run.mixed.targets)
    )


def test_rows_without_a_target_count_for_nothing() -> None:
    run = in_task(2)
    output, batch = run.architecture(run.mixed), run.mixed
    ignored = batch.replaced(targets=torch.where(torch.arange(len(batch)) == 0, IGNORE, batch.targets))
    kept = torch.arange(1, len(batch))
    expected = run.strategies[0].objective(replace(output, logits=output.logits[kept]), batch.rows(kept))
    assert torch.allclose(run.strategies[0].objective(output, ignored), expected)
