"""The clock of the levels that a model has of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from token_rows import batch_of

from clplat.architectures.continuum_memory.options import CMSLevel, ContinuumMemory
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.strategies.optimizers.level_clock import LevelClock
from clplat.streams.base import Spec


def decoder(*levels: CMSLevel, carry: Any = "sequential") -> MemoryTransformer:
    torch.manual_seed(0)
    memory = ContinuumMemory(levels=levels, carry=carry) if levels else None
    spec = Spec(kind="language", input_shape=(6,), num_outputs=11)
    return MemoryTransformer(
        spec=spec, hidden_size=8, layers=[AttentionLayer(num_heads=2)] * 2, feed_forward=memory
    ).double()


def read_a_row(model: MemoryTransformer, step: int) -> None:
    row = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(step))
    torch.nn.functional.cross_entropy(model(batch_of(row)).logits.flatten(0, 1), row.flatten()).backward()


def test_without_levels_of_its_own_the_clock_takes_the_models_and_each_changes_at_multiples_of_its_period() -> None:
    model = decoder(
        CMSLevel(), CMSLevel(period=2, lr=0.5), CMSLevel(period=3, reduction="mean"), CMSLevel(period=4, clock="token")
    )
    optimizer = LevelClock.for_module(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    assert {group["level"]: group["lr"] for group in optimizer.param_groups} == {
        "step1": 0.1, "step2": 0.5, "step3": 0.1, "rest": 0.1,
    }  # fmt: skip
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gathered = {name: torch.zeros_like(p) for name, p in own.items()}
    for step in range(1, 8):
        before = {name: p.detach().clone() for name, p in own.items()}
        optimizer.zero_grad()
        read_a_row(model, step)
        for name, p in own.items():
            assert p.grad is not None
            gathered[name] += p.grad
        optimizer.step()
        for name, p in own.items():
            period = next((n for n in (2, 3) if f".levels.step{n}." in name), 1)
            if step % period:
                assert torch.equal(p, before[name])
                continue
            rate = {1: 0.1, 2: 0.5, 3: 0.1 / 3}[period]
            torch.testing.assert_close(p.detach(), before[name] - rate * gathered[name], rtol=0, atol=1e-14)
            gathered[name].zero_()


@pytest.mark.parametrize("carry", ["sequential", "nested"])
def test_levels_whose_rate_is_zero_stay_what_they_were(carry: str) -> None:
    model = decoder(CMSLevel(lr=0.0), CMSLevel(period=2, lr=0.0), carry=carry)
    optimizer = LevelClock.for_module(model, optimizer=partial(torch.optim.AdamW, lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        optimizer.zero_grad()
        read_a_row(model, step)
        optimizer.step()
    for name, p in model.named_parameters():
        # AdamW decays weights by rate · decay, which is 0 with the rate.
        assert torch.equal(p, before[name]) == (".levels." in name)


def test_a_model_without_levels_needs_them_named() -> None:
    for model in (decoder(), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"levels: {type(model).__name__} has none at the clock of training"):
            LevelClock.for_module(model, optimizer=partial(torch.optim.AdamW, lr=0.01))
