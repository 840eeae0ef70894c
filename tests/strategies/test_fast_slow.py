"""FastSlow: each equation of docs/fast_slow.md recomputed, and each ablation changes what it names and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.objective import Objective
from clplat.strategies.fast_slow import FastSlow
from clplat.strategies.slow_weights import SlowWeights
from clplat.strategies.toy_run import BATCH, CLASSES, STEPS, ToyRun
from clplat.strategies.weights import flat_parameters
from clplat.streams.episodes import EpisodeShape, draw_episodes

OPTIONS: dict[str, Any] = {
    "memory_per_class": 4, "strength": 2.0, "plasticity": 3.0, "episodes": 4, "slow_rate": 0.1,
    "episode": EpisodeShape(ways=2, shots=1, queries=2), "to_slow": 0.2, "to_fast": 0.3, "decay": 0.5,
}  # fmt: skip


def made(**changes: Any) -> tuple[FastSlow, ToyRun]:
    strategy = FastSlow(**(OPTIONS | changes))
    return strategy, ToyRun([strategy], Objective)


def before_second_boundary(**changes: Any) -> tuple[FastSlow, ToyRun]:
    """A run that has done all steps of its second task, and not yet what belongs to its end."""
    strategy, run = made(**changes)
    run.train(STEPS)
    strategy.task_end = lambda task: None  # type: ignore[method-assign]
    run.train(2 * STEPS)
    del strategy.task_end
    return strategy, run


def slow_flat(strategy: FastSlow) -> Tensor:
    assert strategy.slow is not None
    return flat_parameters(strategy.slow.model).detach().clone()


def fast_flat(run: ToyRun) -> Tensor:
    return flat_parameters(run.architecture).detach().clone()


def test_the_first_task_makes_both_sets_one() -> None:
    strategy, run = made()
    run.train(STEPS)
    assert torch.equal(slow_flat(strategy), fast_flat(run))
    run.train(STEPS + 1)
    assert not torch.equal(slow_flat(strategy), fast_flat(run))


def test_meta_plasticity_lies_in_0_to_1_and_falls_with_importance() -> None:
    strategy, run = made()
    assert torch.equal(strategy.meta_plasticity(), torch.ones_like(fast_flat(run))), "nothing is important yet"
    run.train(STEPS)
    m, importance = strategy.meta_plasticity(), strategy.importance
    assert 0 < float(m.min()) < float(m.max()) <= 1
    assert torch.equal(m.argsort(descending=True, stable=True), importance.argsort(stable=True))
    torch.testing.assert_close(m, 1 / (1 + 3.0 * importance / importance.mean()))
    strategy.plasticity = 0.0
    assert torch.equal(strategy.meta_plasticity(), torch.ones_like(m))


def test_step_2_follows_its_equations_one_by_one() -> None:
    strategy, run = before_second_boundary()
    task, fast, slow, m = run.path[1], fast_flat(run), slow_flat(strategy), strategy.meta_plasticity()
    rows, state = strategy.rows(task), run.context.generator.get_state()
    draw = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=run.context.generator)))
    support, asked = draw_episodes(rows.targets, strategy.episode, 4, draw)
    model = SlowWeights(strategy.slow.model).model
    for known, queries in zip(support, asked, strict=True):
        hidden = model(rows).hidden
        means = hidden[known].mean(1)
        logits = -torch.cdist(hidden[queries.flatten()], means).square()
        loss = F.cross_entropy(logits, torch.tensor([0, 0, 1, 1]))
        pulls = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        slow = slow - 0.1 * m * torch.cat([pull.flatten() for pull in pulls])
        torch.nn.utils.vector_to_parameters(slow, model.parameters())
    assert not torch.allclose(slow, slow_flat(strategy), atol=1e-4), "the episodes must have moved something"
    slow = slow + 0.2 * m * (fast - slow)
    run.context.generator.set_state(state)
    strategy.consolidate(task, strategy.slow)
    torch.testing.assert_close(slow_flat(strategy), slow, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(fast_flat(run), fast + 0.3 * (slow - fast), atol=1e-6, rtol=1e-4)


def test_importance_decays_and_is_anchored_at_the_fast_weights_after_the_exchange() -> None:
    strategy, run = made()
    run.train(STEPS)
    first = strategy.importance.clone()
    run.train(2 * STEPS)
    new = strategy.importance - 0.5 * first
    assert float(new.min()) > -1e-9 and float(new.max()) > 0
    assert torch.equal(strategy.anchor, fast_flat(run))


def test_the_penalty_is_the_quadratic_and_the_distillation_of_all_rows() -> None:
    strategy, run = made()
    run.train(STEPS + 2)
    output, batch = run.architecture(run.mixed), run.mixed
    assert len(batch) > BATCH, "the memory must be in the batch"
    held = 0.5 * 2.0 * (strategy.importance * (fast_flat(run) - strategy.anchor).square()).sum()
    old = strategy.distiller.teacher(batch).logits[:, :2]  # the classes met before the task
    apart = F.kl_div((output.logits[:, :2] / 2).log_softmax(1), (old / 2).log_softmax(1), log_target=True,
                     reduction="batchmean")  # fmt: skip
    torch.testing.assert_close(strategy.penalty(output, batch), held + 4 * apart)


def test_the_memory_holds_so_many_rows_of_every_class_and_episodes_see_no_row_twice() -> None:
    strategy, run = before_second_boundary()
    rows = strategy.rows(run.path[1])
    assert len(rows) == 4 + 4 + 12 and len(rows.inputs.unique(dim=0)) == len(rows)
    strategy.task_end(run.path[1])
    run.train()
    assert strategy.buffer.batch().targets.bincount(minlength=CLASSES).tolist() == [4] * CLASSES


CHANGES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "no transfer to slow": ({"to_slow": 0.0}, True, True),
    "no transfer to fast": ({"to_fast": 0.0}, False, True),
    "no meta-plasticity": ({"plasticity": 0.0}, True, True),
    "no step 2": ({"episodes": 0}, True, True),
    "single": ({"single": True}, True, True),
}
"""Options, and whether slow and fast weights after the second task differ from those of the whole method."""


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_changes_what_it_names(name: str) -> None:
    options, slow_differs, fast_differs = CHANGES[name]
    (whole, first), (less, second) = made(), made(**options)
    first.train(STEPS), second.train(STEPS)
    assert torch.equal(fast_flat(first), fast_flat(second)), "nothing differs before the first exchange"
    first.train(2 * STEPS), second.train(2 * STEPS)
    assert torch.equal(slow_flat(whole), slow_flat(less)) != slow_differs
    assert torch.equal(fast_flat(first), fast_flat(second)) != fast_differs


def test_without_transfer_to_fast_the_fast_weights_know_nothing_of_the_slow_ones() -> None:
    runs = [made(to_fast=0.0, episodes=count)[1].train() for count in (0, 7)]
    assert torch.equal(fast_flat(runs[0]), fast_flat(runs[1]))


def test_without_transfer_to_slow_and_episodes_the_slow_weights_stay_where_they_were() -> None:
    strategy, run = made(to_slow=0.0, episodes=0)
    run.train(STEPS)
    first = slow_flat(strategy)
    run.train()
    assert torch.equal(slow_flat(strategy), first)


def test_a_single_set_ends_as_one_and_its_episodes_move_the_fast_weights() -> None:
    strategy, run = before_second_boundary(single=True)
    fast = fast_flat(run)
    strategy.task_end(run.path[1])
    assert torch.equal(slow_flat(strategy), fast_flat(run)) and not torch.equal(fast, fast_flat(run))


def test_the_slow_view_answers_with_the_slow_weights_and_leaves_the_fast_ones_as_they_were() -> None:
    strategy, run = made()
    run.train(2 * STEPS + 2)
    fast, batch = fast_flat(run), run.path[0].train.batch(torch.arange(6))
    answered = strategy.predict(batch)
    with strategy.views()["slow"]():
        assert torch.equal(fast_flat(run), slow_flat(strategy))
        slowly = strategy.predict(batch)
    assert torch.equal(fast_flat(run), fast)
    assert torch.equal(strategy.predict(batch), answered) and not torch.equal(slowly, answered)


def test_answers_come_from_prototypes_or_from_the_head_among_the_classes_met() -> None:
    prototypes, head = made(), made(answers="head")
    batch = prototypes[1].path[0].train.batch(torch.arange(6))
    for strategy, run in (prototypes, head):
        run.train(2 * STEPS)
        hidden = strategy.predict(batch).isinf().all(0)
        assert hidden.tolist() == [False] * 4 + [True] * 2
    logits = head[1].architecture(batch).logits[:, :4]
    assert torch.equal(head[0].predict(batch)[:, :4], logits)
    own, kept = prototypes[1].architecture(batch).hidden, prototypes[0].buffer.batch()
    features = F.normalize(prototypes[1].architecture(kept).hidden)
    mean = F.normalize(features[kept.targets == 1].mean(0), dim=0)
    torch.testing.assert_close(
        prototypes[0].predict(batch)[:, 1], -(F.normalize(own) - mean).square().sum(1), atol=1e-5, rtol=1e-4
    )


WRONG = {
    "memory_per_class: 2 rows a class do not hold an episode's 3": {"memory_per_class": 2},
    "to_slow: must lie between 0 and 1, got 1.5": {"to_slow": 1.5},
    "decay: must lie between 0 and 1": {"decay": -0.1},
    "slow_rate: must not be negative, got -1": {"slow_rate": -1.0},
    "answers: must be prototypes or head, got 'both'": {"answers": "both"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastSlow(**(OPTIONS | WRONG[message]))
