"""The first TRC²: what was published sees the future, what is here does not, whatever its switches say."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import combinations, product

import pytest
import torch
from trc2_models import rows

from clplat.architectures import contract as checks
from clplat.architectures.probing import Contract, loss_of
from clplat.architectures.trc2_v1.chunks import chunk_means, chunked, joined, row_statistics
from clplat.architectures.trc2_v1.model import TRC2V1, _with_published_leaks
from clplat.architectures.trc2_v1.options import V1Sizes, V1Switches
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(11,), num_outputs=19)
SIZES = V1Sizes(units=4, state_size=5, chunk=4, kernel=3, patterns=5, rank=3)
NAMES = [field.name for field in fields(V1Switches)]


def v1(spec: Spec = TEXT, **options) -> TRC2V1:
    torch.manual_seed(0)
    return TRC2V1(**({"spec": spec, "hidden_size": 16, "num_layers": 2, "sizes": SIZES, "dropout": 0.0} | options))


def opened(model: TRC2V1) -> TRC2V1:
    """With every path that begins at zero open."""
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_()
    return model


def off(*names: str) -> V1Switches:
    return V1Switches(**{name: name not in names for name in NAMES})


def settings() -> list[V1Switches]:
    """Ten settings in which every two switches meet in all values that go together: each switch is on in a half of its
    own that contains the first setting, so that no half is another's or its opposite (Kleitman & Spencer 1973)."""
    halves = [{0, *four} for four in list(combinations(range(1, 10), 4))[::14]]
    rows = [{name for name, half in zip(NAMES, halves) if number in half} for number in range(10)]
    rows += [on | {"memory"} for on in rows if "gated_readout" in on]
    rows += [on - {"gated_readout"} for on in rows if "memory" not in on]
    return [off(*set(NAMES) - on) for on in rows if "gated_readout" not in on or "memory" in on]


def test_the_settings_make_every_two_values_meet_that_go_together() -> None:
    for (a, x), (b, y) in product(product(NAMES, (True, False)), repeat=2):
        wanted = {a: x, b: y}
        impossible = wanted == {"memory": False, "gated_readout": True} or len(wanted) == 1
        assert impossible or any(all(getattr(s, n) is v for n, v in wanted.items()) for s in settings()), wanted


@pytest.mark.parametrize("switches", settings(), ids=range(len(settings())))
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_every_setting_is_causal(switches: V1Switches, pooling: str) -> None:
    sizes = replace(SIZES, pooling=pooling)
    checks.is_causal(
        Contract(factory=lambda spec: opened(v1(spec, sizes=sizes, switches=switches, num_layers=1)), spec=TEXT)
    )


def test_what_was_published_sees_the_future_and_this_does_not() -> None:
    batch = rows(2, 16)
    changed = batch.inputs.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 19
    spec = replace(TEXT, input_shape=(16,))
    for pooling in ("first", "mean"):
        model = opened(v1(spec, sizes=replace(SIZES, chunk=16, pooling=pooling))).double()
        kept = model(batch).logits - model(batch.replaced(inputs=changed)).logits
        leaking = _with_published_leaks(model)
        seen = leaking(batch).logits - leaking(batch.replaced(inputs=changed)).logits
        assert not kept[:, :15].any() and kept[:, 15].any()
        assert (seen[:, 8].abs() > 1e-6).any(), "position 15 is seen at 8"


def trained_on_noise(model: TRC2V1) -> float:
    """Loss in nats on fresh random tokens, about which the past says nothing, after training on such."""
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-2), torch.tensor(0.0)
    for step in range(120):
        batch = rows(16, 16, seed=step, outputs=8)
        optimizer.zero_grad()
        output = model(batch)
        loss_of(output, batch).backward()
        optimizer.step()
    batch = rows(64, 16, seed=9999, outputs=8)
    with torch.no_grad():
        output = model.eval()(batch)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
    return float(loss)


def test_on_noise_the_published_form_wins_what_nothing_honest_could() -> None:
    spec = Spec(kind="language", input_shape=(16,), num_outputs=8)
    sizes = replace(SIZES, chunk=2, pooling="mean")
    honest = trained_on_noise(v1(spec, sizes=sizes, hidden_size=32, num_layers=1))
    leaking = trained_on_noise(_with_published_leaks(v1(spec, sizes=sizes, hidden_size=32, num_layers=1)))
    assert honest > 0.99 * math.log(8)
    assert leaking < 0.85 * math.log(8)


def test_chunks_come_back_as_they_were_and_means_come_from_the_chunk_before() -> None:
    x = torch.arange(10.0).view(1, 10, 1)
    parts = chunked(x, 4)
    assert torch.equal(joined(parts, 10), x)
    assert chunk_means(parts, causal=True).flatten().tolist() == [0.0, 1.5, 5.5]
    assert chunk_means(parts, causal=False).flatten()[:2].tolist() == [1.5, 5.5]
    before = row_statistics(parts, causal=True)[0, :, 0]
    assert before.tolist() == [0.0, 1.5, 3.5]


def test_a_chunk_uses_as_many_units_as_it_is_told() -> None:
    router = v1().blocks[0].router
    weights = router.weights(torch.randn(2, 3, 4))
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


def test_even_use_of_units_has_the_least_route_loss() -> None:
    model = v1(num_layers=1)
    with torch.no_grad():
        model.blocks[0].router.keys.zero_()
        model.blocks[0].router.sharpness.zero_()
    assert float(model(rows(2, 11)).losses["route"].detach()) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: v1(causal=False), "TRC2V1.causal: false would let every token see"),
        (lambda: v1(num_layers=0), "num_layers: must be at least 1"),
        (lambda: v1(Spec(kind="classify", input_shape=(4,), num_outputs=2)), "kind 'classify'"),
        (lambda: v1(max_positions=5)(rows(1, 6)), "max_positions: a row of 6 tokens is longer than the table of 5"),
        (lambda: V1Switches(memory=False), "gated_readout: is opened by the memory"),
        (lambda: V1Sizes(units_per_chunk=9), "units_per_chunk: 9 exceeds units"),
        (lambda: V1Sizes(pooling="last"), "pooling: must be one of first, mean"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
