"""The nearest-mean classifier: its answers against a direct computation, what it hides, and when it measures anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clplat.architectures.base import Output
from clplat.objective import Objective
from clplat.strategies.nearest_mean import NearestMean
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import CLASSES, ROWS, STEPS, ToyModel, ToyRun


@torch.enable_grad()
def in_second_task() -> tuple[ToyRun, NearestMean]:
    replay = ExperienceReplay(capacity=10)
    run = ToyRun([replay], Objective).train(STEPS + 2)
    return run, NearestMean(run.context, replay.buffer, "Replay")


@torch.no_grad()
def test_scores_are_minus_squared_distances_to_the_means_of_rows_at_unit_length() -> None:
    run, nearest = in_second_task()
    rows, asked = nearest.buffer.batch(), run.path[0].train.batch(torch.arange(ROWS))
    features, of_asked = (run.architecture(batch).hidden.double() for batch in (rows, asked))
    features, of_asked = (part / part.norm(dim=1, keepdim=True) for part in (features, of_asked))
    scores = nearest.logits(asked)
    assert sorted(rows.targets.unique().tolist()) == [0, 1, 2, 3]
    for label in range(4):
        mean = features[rows.targets == label].mean(0)
        expected = -(of_asked - mean / mean.norm()).square().sum(1)
        assert torch.allclose(scores[:, label].double(), expected, atol=1e-6)
    assert (scores[:, 4:] == float("-inf")).all()


@torch.no_grad()
def test_mixed_precision_rounds_features_and_not_the_distances_between_them() -> None:
    run, nearest = in_second_task()
    asked = run.path[0].train.batch(torch.arange(ROWS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, (means, _) = nearest.logits(asked), nearest.means()
        features = run.architecture(asked).hidden.float()
    features = features / features.norm(dim=1, keepdim=True)
    expected = -(features.unsqueeze(1) - means).square().sum(-1)
    assert torch.allclose(scores[:, :4], expected[:, :4], atol=1e-5)


@torch.no_grad()
def test_a_class_seen_without_rows_stands_farther_than_any_other() -> None:
    run, nearest = in_second_task()
    nearest.buffer.rows["targets"].clamp_(max=2)
    scores = nearest.logits(run.path[1].train.batch(torch.arange(ROWS)))
    assert (scores[:, 3] == -4).all() and (scores[:, :3] > -4).all()


@torch.no_grad()
def test_before_anything_is_stored_the_model_answers_itself() -> None:
    run = ToyRun([ExperienceReplay(capacity=10)], Objective)
    nearest = NearestMean(run.context, run.strategies[0].buffer, "Replay")
    batch = run.path[0].train.batch(torch.arange(ROWS))
    assert torch.equal(nearest.logits(batch), run.architecture(batch).logits)


@torch.no_grad()
def test_in_the_task_scenario_a_row_is_answered_among_the_classes_of_its_task() -> None:
    run, nearest = in_second_task()
    spec = replace(run.context.spec, scenario="task")
    run.context.spec, run.context.masked = spec, Objective(spec, run.context.tasks).masked
    scores = nearest.logits(run.path[0].train.batch(torch.arange(ROWS)))
    assert scores.isfinite().tolist() == [[True, True, False, False, False, False]] * ROWS


@torch.no_grad()
def test_means_are_measured_anew_after_weights_or_rows_have_changed_and_not_otherwise() -> None:
    run, nearest = in_second_task()
    batch = run.path[0].train.batch(torch.arange(ROWS))
    before = nearest.means()
    nearest.logits(batch)
    assert nearest.means() is before
    run.architecture.first.weight.mul_(-1.5)
    changed = nearest.means()
    assert not torch.allclose(changed[0], before[0])
    nearest.buffer.add(batch)
    assert nearest.means() is not changed


def test_means_equal_those_of_avalanches_classifier() -> None:
    from clplat.streams.avalanche_stream import quiet

    with quiet():
        from avalanche.models import NCMClassifier
    run, nearest = in_second_task()
    theirs = NCMClassifier(normalize=True)
    with torch.no_grad():
        means, known = nearest.means()
        theirs.replace_class_means_dict({label: means[label] for label in range(4)})
        batch = run.path[1].train.batch(torch.arange(ROWS))
        distances = -theirs(run.architecture(batch).hidden)
        assert torch.allclose(nearest.logits(batch)[:, :4], -distances.square(), atol=1e-5)
    assert known.tolist() == [True] * 4 + [False] * (CLASSES - 4)


def test_a_model_without_features_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyModel, "forward", lambda self, batch, state=None, return_hidden=None: Output(
        logits=self.head(self.first(batch.inputs))))  # fmt: skip
    run = ToyRun([ExperienceReplay(capacity=10)], Objective)
    with pytest.raises(ValueError, match="SCR: ToyModel shows no features"):
        NearestMean(run.context, run.strategies[0].buffer, "SCR")
