"""Weights between the last boundary and now: which they are, who sees them, and that training may not notice."""

from __future__ import annotations

import pytest
import torch

from clplat.objective import Objective
from clplat.strategies.interpolated_weights import InterpolatedWeights
from clplat.strategies.toy_run import STEPS, ToyRun
from clplat.strategies.weights import flat_parameters


def flat(run: ToyRun) -> torch.Tensor:
    return flat_parameters(run.architecture).detach().clone()


def test_the_view_answers_with_the_anchor_plus_a_share_of_what_was_learnt_since_and_leaves_no_trace() -> None:
    between = InterpolatedWeights(share=0.7)
    run = ToyRun([between], Objective)
    plain = ToyRun([], Objective)
    ends = []
    for step in range(1, run.length + 1):
        trained = flat(run.train(step))
        expected = trained
        for end in ends[:1]:
            first = end
            second = torch.lerp(first, ends[1], 0.7) if len(ends) > 1 else first
            expected = torch.lerp(second, trained, 0.7)
        with between.views()["interpolated"]():
            torch.testing.assert_close(flat(run), expected)
        assert torch.equal(flat(run), trained)
        if step % STEPS == 0:
            ends.append(trained)
    assert torch.equal(flat(run), flat(plain.train()))


def test_adopted_the_next_task_goes_on_from_between() -> None:
    between = InterpolatedWeights(share=0.7, adopt=True)
    run = ToyRun([between], Objective).train(STEPS)
    first = flat(run)
    trained = flat(ToyRun([], Objective).train(2 * STEPS))
    torch.testing.assert_close(flat(run.train(2 * STEPS)), torch.lerp(first, trained, 0.7))
    assert not between.views()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share: must lie above 0 and at most at 1"):
        InterpolatedWeights(share=share)
