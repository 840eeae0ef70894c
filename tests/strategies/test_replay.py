"""Replay and dark experience: what is mixed in, what it adds to the loss, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clplat.objective import Objective
from clplat.strategies.distillation import DER, DERpp
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import BATCH, ROWS, STEPS, TASKS, ToyRun
from clplat.streams.batch import AUXILIARY, CURRENT, REPLAY


@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.5])
def test_ratio_rows_are_added_for_each_current_row_from_the_second_task_on(ratio: float) -> None:
    run = ToyRun([ExperienceReplay(capacity=12, ratio=ratio, weight=0.5)], Objective)
    for step in range(1, run.length + 1):
        run.train(step)
        if step <= STEPS:
            assert run.mixed is run.current
        else:
            assert run.mixed.origin.bincount().tolist() == [BATCH, round(ratio * BATCH)]
            assert run.mixed.weight[run.mixed.origin == REPLAY].unique().tolist() == [0.5]
            assert torch.equal(run.mixed.inputs[:BATCH], run.current.inputs)


def test_from_task_one_replays_within_the_first_task_once_there_are_rows() -> None:
    run = ToyRun([ExperienceReplay(capacity=12, from_task=1)], Objective)
    assert len(run.train(1).mixed) == BATCH
    assert len(run.train(2).mixed) == 2 * BATCH


def test_replayed_rows_are_not_stored_again_and_every_current_row_is_offered_once() -> None:
    replay = ExperienceReplay(capacity=12)
    ToyRun([replay], Objective).train()
    assert replay.buffer.seen == TASKS * STEPS * BATCH
    assert len(replay.buffer) == 12


def test_with_mean_all_the_loss_is_one_mean_over_all_rows() -> None:
    run = ToyRun([ExperienceReplay(capacity=12, ratio=0.5, mean="all")], Objective).train(STEPS + 1)
    batch = run.mixed
    assert (batch.origin == REPLAY).any()
    output = run.architecture(batch)
    expected = torch.nn.functional.cross_entropy(output.logits, batch.targets)
    assert torch.allclose(run.context.loss(output, batch), expected)


def test_filled_at_the_end_of_tasks_every_draw_is_of_earlier_ones() -> None:
    replay = ExperienceReplay(capacity=12, fill="task_end")
    run = ToyRun([replay], Objective).train(STEPS - 1)
    assert not len(replay.buffer)
    run.train(STEPS + 2)
    assert set(run.mixed.task[run.mixed.origin == REPLAY].tolist()) == {0}
    assert replay.buffer.seen == len(run.path[0].train)


def test_the_loss_is_the_current_mean_plus_weight_times_the_replayed_mean() -> None:
    run = ToyRun([ExperienceReplay(capacity=12, ratio=0.5, weight=0.3)], Objective).train(STEPS + 1)
    output = run.architecture(run.mixed)
    current = F.cross_entropy(output.logits[:BATCH], run.mixed.targets[:BATCH])
    replayed = F.cross_entropy(output.logits[BATCH:], run.mixed.targets[BATCH:])
    assert torch.allclose(run.context.loss(output, run.mixed), current + 0.3 * replayed)


def test_a_knob_that_a_controller_turns_takes_effect_at_the_next_batch() -> None:
    replay = ExperienceReplay(capacity=12, ratio=1.0)
    run = ToyRun([replay], Objective).train(STEPS + 1)
    replay.ratio = 2.0
    assert len(run.train(STEPS + 2).mixed) == 3 * BATCH
    replay.ratio = 0.0
    assert len(run.train(STEPS + 3).mixed) == BATCH


@pytest.mark.parametrize("kind", ["classify", "language"])
def test_capacity_in_bytes_is_never_exceeded_and_wastes_less_than_a_row(kind: str) -> None:
    replay = ExperienceReplay(capacity_bytes=301)
    ToyRun([replay], Objective, kind).train()
    row = 5 * 4 + (5 * 4 if kind == "language" else 4) + 4  # inputs, targets, task
    assert replay.row_bytes() == row
    assert 301 - row < replay.stored_bytes() <= 301


def test_dark_experience_counts_the_logits_that_it_stores() -> None:
    dark = DERpp(capacity_bytes=600)
    ToyRun([dark], Objective).train()
    row = 5 * 4 + 4 + 4 + 6 * 4
    assert dark.stored_bytes() == 600 // row * row
    assert dark.buffer.rows["extra.logits"].shape == (600 // row, 6)


def test_der_loss_is_current_plus_alpha_mse_on_one_draw_plus_beta_cross_entropy_on_another() -> None:
    dark = DERpp(capacity=12, alpha=0.7, beta=0.4, ratio=1.5)
    run = ToyRun([dark], Objective).train(STEPS + 1)
    dark.fresh.append(run.current)
    batch, output = run.mixed, run.architecture(run.mixed)
    assert batch.origin.tolist() == [CURRENT] * 4 + [AUXILIARY] * 3 + [REPLAY] * 3
    assert batch.weight.tolist() == pytest.approx([1.0] * 4 + [0.0] * 3 + [0.4] * 3)
    logits, targets = output.logits, batch.targets
    expected = F.cross_entropy(logits[:4], targets[:4]) + 0.4 * F.cross_entropy(logits[7:], targets[7:])
    expected = expected + 0.7 * (logits[4:7] - batch.extra["logits"][4:7]).square().sum() / (3 * 6)
    assert torch.allclose(run.context.loss(output, batch) + dark.penalty(output, batch), expected)


def test_der_is_current_plus_alpha_mse_on_one_whole_draw_and_replays_no_label() -> None:
    dark = DER(capacity=12, alpha=0.7, ratio=1.5)
    run = ToyRun([dark], Objective).train(STEPS + 1)
    dark.fresh.append(run.current)
    batch, output = run.mixed, run.architecture(run.mixed)
    assert batch.origin.tolist() == [CURRENT] * 4 + [AUXILIARY] * 6
    expected = F.cross_entropy(output.logits[:4], batch.targets[:4])
    expected = expected + 0.7 * (output.logits[4:] - batch.extra["logits"][4:]).square().mean()
    assert torch.allclose(run.context.loss(output, batch) + dark.penalty(output, batch), expected)


def test_of_the_largest_logits_value_and_place_are_kept_and_the_distance_is_taken_over_them() -> None:
    dark = DERpp(capacity=12, alpha=0.7, beta=0.4, ratio=1.5, top_logits=2)
    run = ToyRun([dark], Objective, "language").train(STEPS + 1)
    dark.fresh.append(run.current)
    batch, output = run.mixed, run.architecture(run.mixed)
    places, kept = batch.extra["places"][4:7], batch.extra["logits"][4:7]
    assert kept.shape == places.shape == (3, 5, 2) and kept.dtype == torch.float16
    expected = 0.7 * (output.logits[4:7].gather(-1, places) - kept.float()).square().mean()
    assert torch.allclose(dark.penalty(output, batch), expected)
    answers = run.architecture(run.current).logits
    assert torch.equal(dark.fresh[-1].extra["places"], answers.topk(2).indices)
    assert dark.row_bytes() == 5 * 4 + 5 * 4 + 4 + 5 * 2 * 6
    assert dark.stored_bytes() == 12 * dark.row_bytes()


def test_stored_logits_are_what_the_model_answered_before_the_step_that_stored_them() -> None:
    dark = DERpp(capacity=ROWS)
    run = ToyRun([dark], Objective)
    answers = run.architecture(run._rows(run.path[0])).logits.detach()
    run.train(1)
    assert torch.equal(dark.buffer.rows["extra.logits"][:BATCH], answers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExperienceReplay(capacity=37), r"ExperienceReplay\.capacity: 37 rows, more than .* 36 training rows"),
        (lambda: DERpp(capacity_bytes=10**6), r"DERpp\.capacity_bytes: .* at 52 a row, are 19230 rows, more"),
        (lambda: ExperienceReplay(capacity_bytes=20), r"ExperienceReplay\.capacity_bytes: 20 bytes, .* at least one"),
        (lambda: ExperienceReplay(), "capacity, capacity_bytes: give exactly one"),
        (lambda: ExperienceReplay(capacity=1, capacity_bytes=1), "capacity, capacity_bytes: give exactly one"),
        (lambda: ExperienceReplay(capacity=5, ratio=-1.0), "ratio, weight: must not be negative"),
        (lambda: ExperienceReplay(capacity=5, mean="some"), "mean: must be each or all, got 'some'"),
        (lambda: ExperienceReplay(capacity=5, fill="now"), "fill: must be step or task_end, got 'now'"),
        (lambda: ExperienceReplay(capacity=5, draw="once"), "draw: must be fresh or rounds, got 'once'"),
        (lambda: DERpp(capacity=5, alpha=-1.0), "alpha, beta: must not be negative"),
        (lambda: DERpp(capacity=5, top_logits=0), "top_logits: must be positive, got 0"),
        (lambda: DER(capacity=5, top_logits=7), r"DER\.top_logits: the model has only 6 outputs, got 7"),
        (lambda: DERpp(capacity=5, top_logits=7), r"DERpp\.top_logits: the model has only 6 outputs, got 7"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be_are_refused_by_name_before_training(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyRun([make()], Objective)
