"""Slow weights: they follow by the given share, give way and come back bit for bit, and wrong pairs are refused."""

from __future__ import annotations

import pytest
import torch

from clplat.strategies.paired_weights import SlowFast


def pairs(seed: int = 0, dtype: torch.dtype = torch.float64) -> SlowFast:
    source = torch.Generator().manual_seed(seed)
    fast, slow = ({name: torch.randn(3, size, generator=source, dtype=dtype) for name, size in (("A", 4), ("B", 2))}
                  for _ in range(2))  # fmt: skip
    return SlowFast(fast, slow)


@pytest.mark.parametrize("decay", [0.25, 0.9, 0.999])
def test_distance_to_fixed_fast_weights_shrinks_by_the_decay_at_every_update(decay: float) -> None:
    made = pairs()
    first = float(made.distance())
    for step in range(1, 21):
        made.update(decay)
        assert float(made.distance()) == pytest.approx(first * decay**step, rel=1e-5)


def test_decay_0_copies_and_decay_1_keeps() -> None:
    made = pairs(dtype=torch.float32)
    before = [tensor.clone() for tensor in made.slow]
    made.update(1.0)
    assert all(torch.equal(a, b) for a, b in zip(made.slow, before))
    made.update(0.0)
    assert all(torch.equal(a, b) for a, b in zip(made.slow, made.fast))


def test_interpolation_runs_from_fast_to_slow_factor_by_factor_and_leaves_everything_as_it_was() -> None:
    made = pairs()
    fast, slow = ([tensor.clone() for tensor in side] for side in (made.fast, made.slow))
    for share in (0.0, 0.3, 1.0):
        with made.interpolated(share):
            for now, a, b in zip(made.fast, fast, slow):
                torch.testing.assert_close(now, (1 - share) * a + share * b, rtol=1e-12, atol=1e-12)
    with made.swapped():
        assert all(torch.equal(a, b) for a, b in zip((*made.fast, *made.slow), (*slow, *fast)))
    assert all(torch.equal(a, b) for a, b in zip((*made.fast, *made.slow), (*fast, *slow)))


def test_what_was_interpolated_is_back_after_an_error_too() -> None:
    made = pairs()
    fast = [tensor.clone() for tensor in made.fast]
    with pytest.raises(KeyError), made.interpolated(0.5):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(made.fast, fast))


def test_fast_weights_keep_their_gradients_and_slow_ones_have_none() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    slow = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    made = SlowFast({"A": weight}, {"A": slow})
    (weight * 3).sum().backward()
    made.update(0.5)
    assert weight.grad is not None and slow.grad is None and slow.tolist() == [0.5, 0.5]


def test_names_that_do_not_match_are_refused() -> None:
    # As in LLMCL (names with the adapter in them) and in EasyCL (none of 24 names found).
    fast = {"layer.lora_A.default": torch.ones(2), "layer.lora_B.default": torch.ones(2)}
    with pytest.raises(ValueError, match="4 tensors have no partner, such as 'layer.lora_A.default', which is fast"):
        SlowFast(fast, {name.replace("default", "ema"): torch.ones(2) for name in fast})
    with pytest.raises(ValueError, match="1 tensors have no partner, such as 'B', which is slow alone"):
        SlowFast({"A": torch.ones(1)}, {"A": torch.ones(1), "B": torch.ones(1)})
    with pytest.raises(ValueError, match="there is no fast tensor"):
        SlowFast({}, {})


def test_pairs_that_are_one_tensor_or_unlike_are_refused() -> None:
    both = torch.ones(4)
    with pytest.raises(ValueError, match="the slow 'A' lies in the memory of a fast tensor"):
        SlowFast({"A": both}, {"A": both.detach()})
    with pytest.raises(ValueError, match="lies in the memory of a fast tensor"):
        SlowFast({"A": both[:2]}, {"A": both[2:]})
    with pytest.raises(ValueError, match=r"'A' is \(4,\) of torch.float32 fast and \(2,\) of torch.float32 slow"):
        SlowFast({"A": both}, {"A": torch.ones(2)})
    with pytest.raises(ValueError, match="torch.bfloat16 slow"):
        SlowFast({"A": both}, {"A": torch.ones(4, dtype=torch.bfloat16)})


def test_weights_that_nobody_trains_and_slow_ones_that_stay_are_an_error() -> None:
    made = pairs()
    made.mark()
    made.slow_from_fast()
    for _ in range(3):
        made.update(0.5)
    with pytest.raises(RuntimeError, match="in 3 updates none of the 2 fast tensors moved"):
        made.check_moved()
    made.mark()
    for _ in range(3):
        made.fast[0].add_(1)
        made.update(0.5)
    made.check_moved()  # B was not trained, and has nowhere to go
    made.slow[0].copy_(made._marked[1][0])  # type: ignore[index]
    with pytest.raises(RuntimeError, match="1 of 2 tensors, such as A, did not move in 3 updates"):
        made.check_moved()
