"""The consistency term: its three targets, which tokens count, and no gradient into the slow side."""

from __future__ import annotations

import pytest
import torch

from clplat.strategies.consistency import Target, consistency_loss, counted_tokens, row_means
from clplat.streams.batch import IGNORE

TARGETS = torch.tensor([[IGNORE, 5, 6, IGNORE], [IGNORE, IGNORE, IGNORE, 7], [IGNORE] * 4])


def answers(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    fast, slow = (torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(2))
    return fast.requires_grad_(), slow.requires_grad_()


def test_padding_is_what_follows_a_rows_last_target() -> None:
    assert counted_tokens(TARGETS, "all").all()
    assert counted_tokens(TARGETS, "targets").tolist() == (TARGETS != IGNORE).tolist()
    assert counted_tokens(TARGETS, "tokens").tolist() == [[True, True, True, False], [True] * 4, [False] * 4]


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("target", ["slow", "elementwise_max", "better_ce"])
def test_it_is_the_mean_over_counted_tokens_layers_and_channels(target: Target, layers: tuple[int, ...]) -> None:
    fast, slow = answers(3, *layers, 4, 2)
    counted, better = counted_tokens(TARGETS, "tokens"), torch.tensor([True, False, True])
    found = consistency_loss(
        fast, slow, counted=counted, target=target, better=better if target == "better_ce" else None
    )
    terms = []
    for b in range(3):
        for t in range(4):
            for s in range(3 if layers else 1):
                for c in range(2):
                    place = (b, s, t, c) if layers else (b, t, c)
                    own, other = float(fast[place].detach()), float(slow[place].detach())
                    drawn_to = {
                        "slow": other,
                        "elementwise_max": max(own, other),
                        "better_ce": other if better[b] else own,
                    }
                    terms += [(own - drawn_to[target]) ** 2] if counted[b, t] else []
    assert float(found.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    found.backward()
    assert fast.grad is not None and slow.grad is None
    reached = fast.grad.abs().sum(-1).bool()
    assert not reached.movedim(1, -1)[~counted].any() if layers else not reached[~counted].any()


def test_equal_answers_are_at_no_distance_and_no_counted_token_gives_0() -> None:
    fast, slow = answers(3, 4, 2)
    for target in ("slow", "elementwise_max"):
        assert consistency_loss(fast, fast.detach(), counted=counted_tokens(TARGETS, "all"), target=target) == 0
    assert consistency_loss(fast, slow, counted=torch.zeros(3, 4, dtype=torch.bool)) == 0


def test_a_rows_cost_is_the_mean_over_its_targets() -> None:
    loss = torch.tensor([[0.0, 2.0, 4.0, 0.0], [0.0, 0.0, 0.0, 5.0], [0.0] * 4])
    assert row_means(loss, TARGETS).tolist() == [3.0, 5.0, 0.0]
