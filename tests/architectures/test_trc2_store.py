"""The store's read and delayed write are their definitions, slot by slot and token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clplat.architectures.trc2.critics import Critics
from clplat.architectures.trc2.hippocampus import topk_read
from clplat.architectures.trc2.options import WriteOptions
from clplat.architectures.trc2.store import Experience, Store, best, pieces

OPTIONS = WriteOptions(chunk=4, quota=3, threshold=0.5, merge_above=0.9)


def store(slots: int = 6, *, width: int = 5, **options) -> Store:
    torch.manual_seed(0)
    return Store(hidden_size=width, slots=slots, parts=1, options=replace(OPTIONS, **options)).double()


def experience(seed: int = 0, *, rows: int = 4, length: int = 10, slots: int = 6, width: int = 5) -> Experience:
    draw = torch.Generator().manual_seed(seed)
    counted = torch.rand(rows, length, generator=draw) > 0.2
    counted[0, 4:8] = False  # a piece of which nothing counts
    return Experience(
        hidden=torch.randn(rows, length, width, generator=draw, dtype=torch.float64),
        loss=torch.rand(rows, length, generator=draw, dtype=torch.float64) * 4,
        counted=counted,
        follows=(torch.rand(rows, length, generator=draw) > 0.1) & (torch.arange(length) < length - 1),
        mass=torch.rand(slots, generator=draw, dtype=torch.float64) * 9,
    )


def whole(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.unsqueeze(1)


def read_by_loop(query, key, value, used, k, temperature):
    """Softmax over the k best slots in use, one query and slot at a time."""
    mixed, mass = torch.zeros_like(query[..., :1].expand(*query.shape[:2], value.shape[1])).clone(), []
    for row in range(query.shape[0]):
        mass.append([0.0] * len(key))
        for token in range(query.shape[1]):
            scores = {j: float(query[row, token] @ key[j]) / temperature for j in range(len(key)) if used[j]}
            chosen = sorted(scores, key=lambda j: -scores[j])[:k]
            total = sum(math.exp(scores[j]) for j in chosen)
            for j in chosen:
                mixed[row, token] += math.exp(scores[j]) / total * value[j]
                mass[row][j] += math.exp(scores[j]) / total
    return mixed, torch.tensor(mass, dtype=query.dtype)


@pytest.mark.parametrize("in_use", [0, 2, 9])
def test_the_read_is_exact_for_an_empty_a_filling_and_a_full_store(in_use: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(*s, 6, generator=draw, dtype=torch.float64) for s in ((3, 7), (9,), (9,)))
    used = torch.arange(9) < in_use
    found = topk_read(query, key, value, used, k=4, temperature=0.5)
    for got, expected in zip(found, read_by_loop(query, key, value, used, 4, 0.5)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert in_use or not found[0].any()


def test_the_gradients_of_the_read_are_right() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, 3, generator=draw, dtype=torch.float64).requires_grad_() for s in ((2, 5), (6,), (6,))]
    used = torch.arange(6) < 5
    assert torch.autograd.gradcheck(lambda *parts: topk_read(*parts, used, k=2, temperature=0.5)[0], inputs)


def offered_by_loop(seen: Experience, size: int) -> list[tuple[float, torch.Tensor]]:
    """Mean loss of every piece, and the vector at its largest loss."""
    offered = []
    for row in range(len(seen.loss)):
        for start in range(0, seen.loss.shape[1], size):
            places = [t for t in range(start, min(start + size, seen.loss.shape[1])) if seen.counted[row, t]]
            if places:
                losses = [float(seen.loss[row, t]) for t in places]
                peak = places[losses.index(max(losses))]
                offered.append((sum(losses) / len(losses), seen.hidden[row, peak]))
    return offered


def flush_by_loop(made: Store, seen: Experience, step: int) -> None:
    """The write, one piece and slot at a time, on a store without critics; signal: the loss."""
    options, offered = made.options, offered_by_loop(seen, made.options.chunk)
    count = len(offered)
    first = sum(score for score, _ in offered) / count
    second = sum(score**2 for score, _ in offered) / count
    weight = float(made.statistics[2])
    mean, square = (
        (0.99 * float(old) + 0.01 * new) / (0.99 * weight + 0.01)
        for old, new in zip(made.statistics[:2], (first, second))
    )
    made.statistics.copy_(torch.tensor([mean, square, 1.0], dtype=torch.float64) * (0.99 * weight + 0.01))
    deviation = math.sqrt(square - mean**2) + 1e-6 * abs(mean)
    chosen = [((s - mean) / deviation, m) for s, m in sorted(offered, key=lambda o: -o[0])]
    chosen = [(z, m) for z, m in chosen[: options.quota] if z > options.threshold]
    made.utility.copy_(options.utility_decay * made.utility + seen.mass / seen.mass.sum())
    before, used = made.content[:, 0].clone(), made.used.tolist()
    keys = {"utility": made.utility, "surprise": made.surprise, "fifo": made.written}[options.eviction].tolist()
    plans, merging = [], {}
    for number, (z, m) in enumerate(chosen):
        if number < used.count(False):
            plans.append((z, m))
            continue
        cosines = [float(torch.cosine_similarity(m, before[j], dim=0)) if used[j] else -2.0 for j in range(len(used))]
        nearest = max(range(len(used)), key=cosines.__getitem__)
        if options.merge and cosines[nearest] > options.merge_above:
            merging.setdefault(nearest, []).append((z, m))
        else:
            plans.append((z, m))
    order = sorted(range(len(used)), key=lambda j: (used[j], j in merging, keys[j] if used[j] else 0))
    for j, parts in merging.items():
        made.content[j, 0] = 0.9 * before[j] + 0.1 * sum(m for _, m in parts) / len(parts)
        made.utility[j] += options.utility_bonus * sum(z for z, _ in parts)
    for (z, m), j in zip(plans, order):
        made.content[j, 0], made.utility[j], made.surprise[j] = m, options.utility_bonus * z, z
        made.used[j], made.written[j] = True, step


@pytest.mark.parametrize("eviction", ["utility", "fifo", "surprise"])
@pytest.mark.parametrize("merge", [True, False])
def test_the_write_is_its_definition_over_steps_that_fill_merge_and_evict(eviction: str, merge: bool) -> None:
    options = {"merge": merge, "merge_above": OPTIONS.merge_above if merge else WriteOptions.merge_above}
    fast, slow = (store(signal="nll", eviction=eviction, **options) for _ in range(2))
    merged = evicted = 0
    for step in range(1, 19):
        seen = experience(step)
        if step % 3 == 0:  # something that the store knows comes back with a large loss
            seen.hidden[1, 2] = 3 * fast.content[step % 5, 0] + 0.01 * seen.hidden[1, 2]
            seen.loss[1, 2], seen.counted[1, :4] = 4.0, torch.tensor([False, False, True, False])
        before = fast.content.clone(), fast.written.clone(), bool(fast.used.all())
        fast.flush(seen, step=step, parts=whole)
        flush_by_loop(slow, seen, step)
        for name, value in fast.state_dict().items():
            torch.testing.assert_close(value, slow.state_dict()[name], rtol=1e-9, atol=1e-12, msg=f"{name} {step}")
        changed = (fast.content != before[0]).any((1, 2))
        merged += int((changed & (fast.written == before[1])).sum())
        evicted += int((fast.written != before[1]).sum()) if before[2] else 0
    assert fast.used.all() and evicted > 2 and (merged > 0) is merge


def critics(**options) -> Critics:
    torch.manual_seed(0)
    return Critics(
        hidden_size=5, **({"slow": True, "discount": 0.9, "rate": 1e-3, "slow_rate": 0.99} | options)
    ).double()


def test_the_signal_is_the_disagreement_of_the_critics_td_errors() -> None:
    pair, seen = critics(), experience()
    found, _ = pair.errors(seen.hidden, seen.loss, seen.follows, seen.counted)
    with torch.no_grad():
        values = [critic(seen.hidden).squeeze(-1) for critic in (pair.fast, pair.slow)]
    for row, token in ((0, 0), (1, 4), (2, 9)):
        errors = []
        for value in values:
            following = float(value[row, token + 1]) if seen.follows[row, token] else 0.0
            errors.append(float(seen.loss[row, token]) + 0.9 * following - float(value[row, token]))
        assert float(found[row, token]) == pytest.approx(abs(errors[0] - errors[1]), abs=1e-12)
    assert found.min() > 0, "equal critics would agree on everything"
    alone, _ = critics(slow=False).errors(seen.hidden, seen.loss, seen.follows, seen.counted)
    assert not torch.allclose(alone, found)


def test_the_fast_critic_learns_as_adam_does_and_the_slow_one_is_its_average() -> None:
    pair, twin, seen = critics(), critics(), experience()
    twin.fast.requires_grad_()
    optimizer = torch.optim.Adam(twin.fast.parameters(), lr=1e-3)
    slow = [p.clone() for p in twin.slow.parameters()]
    for _ in range(5):
        _, gradient = pair.errors(seen.hidden, seen.loss, seen.follows, seen.counted)
        pair.learn(gradient / seen.counted.sum(), torch.tensor(True))
        optimizer.zero_grad()
        value = twin.fast(seen.hidden).squeeze(-1)
        target = seen.loss + 0.9 * seen.follows * torch.nn.functional.pad(value.detach()[:, 1:], (0, 1))
        (target - value)[seen.counted].square().mean().backward()
        optimizer.step()
        slow = [0.99 * old + 0.01 * new.detach() for old, new in zip(slow, twin.fast.parameters())]
    for found, expected in zip(pair.fast.parameters(), twin.fast.parameters()):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    for found, expected in zip(pair.slow.parameters(), slow):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for p in pair.parameters())


def test_pieces_score_what_counts_alone_and_offer_its_peak_or_mean() -> None:
    signal = torch.tensor([[1.0, 9.0, 2.0, 5.0, 3.0, 7.0]])
    hidden = torch.arange(6.0).view(1, 6, 1)
    counted = torch.tensor([[True, False, True, True, True, False]])
    score, peak = pieces(signal, hidden, counted, replace(OPTIONS, chunk=4))
    assert score.tolist() == pytest.approx([8 / 3, 3.0]) and peak.flatten().tolist() == [3.0, 4.0]
    _, mean = pieces(signal, hidden, counted, replace(OPTIONS, chunk=4, candidate="mean"))
    torch.testing.assert_close(mean.flatten(), torch.tensor([5 / 3, 4.0]))


def test_fewer_pieces_than_the_quota_are_filled_up_with_none() -> None:
    score, vectors = best(torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]]), 4)
    assert score.tolist() == [2.0, 1.0, -math.inf, -math.inf] and vectors.flatten().tolist() == [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("signal", ["fast_slow", "fast", "nll", "random"])
def test_every_signal_fills_the_store_within_its_quota_and_none_from_nothing(signal: str) -> None:
    made = store(signal=signal)
    empty = replace(experience(), counted=torch.zeros(4, 10, dtype=torch.bool))
    made.flush(empty, step=1, parts=whole)
    assert not made.used.any() and not made.statistics.any()
    for step in range(2, 8):
        before = made.used.sum()
        made.flush(experience(step), step=step, parts=whole)
        assert 0 <= made.used.sum() - before <= OPTIONS.quota
    assert made.used.all() and all(value.isfinite().all() for value in made.state_dict().values())


def test_a_new_memory_is_not_always_the_first_to_go() -> None:
    made = store(signal="nll", slots=6)
    for step in range(1, 40):
        made.flush(replace(experience(step), mass=made.used.double()), step=step, parts=whole)
    assert made.written.unique().numel() > 2, "slots of several steps live side by side"


@pytest.mark.parametrize("signal", ["fast_slow", "fast", "nll"])
def test_a_step_of_replayed_rows_alone_leaves_store_and_critics_as_they_are(signal: str) -> None:
    made = store(signal=signal)
    for number in range(3):
        made.flush(experience(number), step=number, parts=whole)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert made.utility.any()
    seen = experience(3)
    replayed = replace(seen, counted=torch.zeros_like(seen.counted), mass=torch.zeros_like(seen.mass))
    made.flush(replayed, step=3, parts=whole)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_first_step_of_replayed_rows_alone_leaves_the_critics_finite_and_as_they_were() -> None:
    made, seen = store(signal="fast_slow"), experience()
    before = [weight.clone() for weight in made.parameters()]
    made.flush(replace(seen, counted=torch.zeros_like(seen.counted)), step=0, parts=whole)
    assert all(torch.equal(*pair) for pair in zip(made.parameters(), before))


def test_a_small_store_alone_has_a_quota_that_fits() -> None:
    assert store(slots=8, quota=None).quota == 8 and store(slots=99, quota=None).quota == 16
    made = store(slots=2, quota=None, threshold=-99.0)
    made.flush(experience(slots=2), step=0, parts=whole)
    assert made.used.all()
