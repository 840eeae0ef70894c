"""Growth of the recurrent hypernetwork: what earlier tasks keep, what it adds, and how it is rebuilt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypernetworks import TASKS, batch, lstm, through

from clplat.architectures.probing import saved


@pytest.mark.parametrize("freeze_grown", [True, False])
def test_growth_leaves_the_weights_of_earlier_tasks_bit_equal(freeze_grown: bool) -> None:
    model = through(lstm(grow_by=5, freeze_grown=freeze_grown), 1)
    for index in range(1, 4):
        before = [model.generated_weights([task]) for task in range(index)]
        together = model.generated_weights(range(index))
        model.task_start(TASKS.task(index))
        after = [model.generated_weights([task]) for task in range(index)]
        assert all(torch.equal(a, b) for a, b in zip(after, before))
        assert torch.equal(model.generated_weights(range(index + 1))[:index], together)
        assert model.stages == list(range(index + 1))
    assert [len(stage.outward[0]) for stage in model.generator.stages] == [11, 5, 5, 5]


def test_training_a_grown_frozen_generator_changes_no_bit_of_earlier_tasks() -> None:
    model = through(lstm(grow_by=5), 3).train()
    before, new = model.generated_weights([0, 1]), model.generated_weights([2])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(task=2)).logits, batch().targets).backward()
        assert all(bool(p.grad.any()) for p in trainable)
        optimizer.step()
    assert torch.equal(model.generated_weights([0, 1]), before)
    assert not torch.allclose(model.generated_weights([2]), new, atol=1e-3)


def test_old_units_that_go_on_learning_change_earlier_tasks() -> None:
    model = through(lstm(grow_by=5, freeze_grown=False), 2).train()
    before = model.generated_weights([0]).detach()
    F.cross_entropy(model(batch(task=1)).logits, batch().targets).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(model.generated_weights([0]), before)


@pytest.mark.parametrize("options", [{}, {"grow_by": 4}, {"grow_by": 4, "freeze_grown": False}])
def test_each_task_adds_the_parameters_that_the_page_says(options: dict) -> None:
    model, counts = lstm(**options), []
    for index in range(4):
        model.task_start(TASKS.task(index))
        counts.append(sum(p.numel() for p in model.parameters()))
    units = options.get("grow_by", 0)
    expected = [32 + 4 * units * (64 + 11 + units * before + units + 1) + 50 * units for before in range(3)]
    assert [after - before for before, after in zip(counts, counts[1:])] == expected


def test_a_grown_model_is_rebuilt_from_structure_and_weights_with_the_same_things_frozen() -> None:
    model = through(lstm(grow_by=3), 3)
    twin = lstm(grow_by=3)
    twin.restructure(model.structure())
    twin.load_state_dict(saved(model.state_dict()))
    assert torch.equal(twin.generated_weights(range(3)), model.generated_weights(range(3)))
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, twin)]
    assert trainable[0] == trainable[1]
    for grown in (model, twin):
        grown.task_start(TASKS.task(3))
    assert torch.equal(twin.generated_weights([3]), model.generated_weights([3]))


def test_growth_takes_nothing_from_the_global_generator() -> None:
    model = through(lstm(grow_by=3), 1)
    before = torch.get_rng_state()
    model.task_start(TASKS.task(1))
    assert torch.equal(torch.get_rng_state(), before)
