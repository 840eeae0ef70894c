"""La-MAML: its step against one written out by hand, meta-gradients against finite differences, rates, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from clplat.objective import Objective
from clplat.strategies.la_maml import LaMAML, clipped
from clplat.strategies.toy_run import BATCH, STEPS, ToyRun
from clplat.strategies.world import World
from clplat.streams.batch import Batch

INFINITE = float("inf")


def in_second_task(**options) -> tuple[ToyRun, LaMAML, Batch]:
    """A run in float64 in its second task, and a mixed batch whose step has not been taken."""
    strategy = LaMAML(capacity=12, **options)
    run = ToyRun([strategy], Objective).train(STEPS + 1)
    run.architecture.double()
    strategy.rates = {name: rate.detach().double().requires_grad_() for name, rate in strategy.rates.items()}
    strategy.fresh.append(run.current.replaced(inputs=run.current.inputs.double()))
    return run, strategy, run.mixed.replaced(inputs=run.mixed.inputs.double())


def named(run: ToyRun) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in run.architecture.named_parameters()}


def test_a_first_order_step_is_the_one_written_out_by_hand() -> None:
    run, strategy, batch = in_second_task(inner_steps=2, clip=INFINITE, rate_of_rates=0.05)
    weights, rates = named(run), {name: rate.detach().clone() for name, rate in strategy.rates.items()}
    fast, moved = dict(weights), {name: torch.zeros_like(p) for name, p in weights.items()}
    of_weights, of_rates = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    for part in (slice(0, 2), slice(2, 4)):
        rows = batch.rows(part).replaced(origin=None, weight=None)
        loss = run.context.loss(functional_call(run.architecture, fast, (rows,)), rows)
        for (name, p), pull in zip(list(fast.items()), torch.autograd.grad(loss, list(fast.values()))):
            moved[name] = moved[name] + pull
            fast[name] = (p - rates[name] * pull).detach().requires_grad_()
        loss = run.context.loss(functional_call(run.architecture, fast, (batch,)), batch) / 2
        for name, pull in zip(fast, torch.autograd.grad(loss, list(fast.values()))):
            of_weights[name] = of_weights[name] + pull
            of_rates[name] = of_rates[name] - moved[name] * pull
    strategy.step(batch, run.optimizer)
    for name, p in run.architecture.named_parameters():
        rate = rates[name] - 0.05 * of_rates[name]
        assert torch.allclose(strategy.rates[name], rate, rtol=1e-10, atol=1e-12), name
        assert torch.allclose(p, weights[name] - rate.clamp(min=0) * of_weights[name], rtol=1e-10, atol=1e-12), name
    assert not torch.equal(strategy.rates["head.weight"], rates["head.weight"])


@pytest.mark.parametrize("second_order", [True, False])
def test_meta_gradients_of_second_order_are_those_of_finite_differences(second_order: bool) -> None:
    run, strategy, batch = in_second_task(inner_steps=4, second_order=second_order, clip=INFINITE, initial_rate=0.5)
    weights, rates = named(run), {name: rate.detach().clone().requires_grad_() for name, rate in strategy.rates.items()}
    loss, _ = strategy.meta_loss(weights, rates, batch)
    pulls = torch.autograd.grad(loss, [*weights.values(), *rates.values()])
    draw, close = torch.Generator().manual_seed(0), []
    for place in range(2):
        pull = torch.cat([part.flatten() for part in pulls[place * len(weights) : (place + 1) * len(weights)]])
        direction = torch.randn(len(pull), dtype=torch.float64, generator=draw)
        values = []
        for step in (1e-5, -1e-5):
            both = [weights, rates]
            parts = direction.split([p.numel() for p in both[place].values()])
            both[place] = {name: (p + step * part.view_as(p)).detach().requires_grad_()
                           for (name, p), part in zip(both[place].items(), parts)}  # fmt: skip
            values.append(strategy.meta_loss(both[0], both[1], batch)[0].item())
        slope = (values[0] - values[1]) / 2e-5
        close.append(abs(float(pull @ direction) - slope) < 1e-6 * max(1.0, abs(slope)))
    assert all(close) if second_order else not any(close)


def test_a_weight_whose_rate_is_negative_stays_where_it_is() -> None:
    run, strategy, batch = in_second_task(rate_of_rates=0.0)
    with torch.no_grad():
        strategy.rates["head.weight"][0].fill_(-0.3)
    before = run.weights()["head.weight"]
    strategy.step(batch, run.optimizer)
    after = run.weights()["head.weight"]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1:], before[1:])


def test_the_loss_of_the_step_is_the_meta_loss_before_it_and_the_configured_optimizer_is_left_alone() -> None:
    run, strategy, batch = in_second_task()
    expected, _ = strategy.meta_loss(named(run), strategy.rates, batch)
    loss, output = strategy.step(batch, run.optimizer)
    assert torch.equal(loss, expected.detach()) and not loss.requires_grad and not output.logits.requires_grad
    assert len(output.logits) == len(batch) and not run.optimizer.state


@pytest.mark.parametrize(("inner_steps", "parts"), [(1, 1), (2, 2), (3, 2), (4, 4), (99, 4)])
def test_current_rows_are_cut_into_at_most_so_many_parts_and_the_whole_batch_is_met_after_each(
    inner_steps: int, parts: int
) -> None:
    run, strategy, batch = in_second_task(inner_steps=inner_steps)
    sizes: list[int] = []
    original = strategy.loss_at

    def counting(weights, rows):
        sizes.append(len(rows))
        return original(weights, rows)

    strategy.loss_at = counting
    strategy.meta_loss(named(run), strategy.rates, batch)
    assert sizes[1::2] == [2 * BATCH] * parts and sum(sizes[::2]) == BATCH


def test_clipping_shortens_to_the_norm_and_leaves_what_is_shorter() -> None:
    parts = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    assert torch.allclose(torch.cat([part.flatten() for part in clipped(parts, 1.0)]), torch.tensor([0.6, 0.0, 0.8]))
    assert all(torch.equal(*pair) for pair in zip(clipped(parts, 6.0), parts))


def test_losses_of_the_architecture_itself_count_in_every_loss() -> None:
    run, strategy, batch = in_second_task()
    plain, _ = strategy.loss_at(named(run), batch)
    forward = run.architecture.forward

    def with_loss(*arguments, **options):
        output = forward(*arguments, **options)
        output.losses["balance"] = torch.tensor(2.5)
        return output

    run.architecture.forward = with_loss
    assert torch.allclose(strategy.loss_at(named(run), batch)[0], plain + 2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"inner_steps": 0}, "inner_steps"), ({"initial_rate": 0.0}, "initial_rate"), ({"clip": 0.0}, "clip"),
     ({"rate_of_rates": -1.0}, "rate_of_rates")],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaMAML(capacity=5, **options)


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="LaMAML: owns the step.* training.devices: 1"):
        ToyRun([LaMAML(capacity=5)], Objective, world=World(rank=0, size=2))
