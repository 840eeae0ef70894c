"""The thalamic router is its equations, token by token, and its parts do what their names say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clplat.architectures.trc2.options import ThalamusOptions
from clplat.architectures.trc2.reading import places_in_documents
from clplat.architectures.trc2.thalamus import EPSILON, Thalamus, running_sums

SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 2, 3, 3]])


def router(**options) -> Thalamus:
    torch.manual_seed(0)
    made = Thalamus(hidden_size=12, options=ThalamusOptions(**({"rank": 6, "groups": 3} | options))).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


def stream(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randn(rows, length, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def token_loop(model: Thalamus, x_TC: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """One document, one token at a time: the definition. Signals (T, C) and surprises."""
    options, seen, deltas, signals, surprises = model.options, [], [], [], []
    for x in x_TC:
        c = model.compress(model.norm(model.layer5(x)))
        unit = c / (c.square().mean() + EPSILON).sqrt()
        delta, surprise = None, 0.0
        if seen and options.surprise != "none":
            before = seen[-1] / (seen[-1].square().mean() + EPSILON).sqrt()
            delta = float((unit - model.predict.weight @ before).square().mean())
            if options.surprise == "td":
                delta += options.discount * float(model.value(unit)) - float(model.value(before))
        if deltas:
            root = math.sqrt(sum(d * d for d in deltas) / len(deltas)) + EPSILON
            surprise = max(-options.clip, min(options.clip, delta / root))
        past = sum(seen) / len(seen) if seen else torch.zeros_like(c)
        mixed = torch.zeros_like(c)
        shifted = options.surprise != "none"
        if options.focal:
            mixed = mixed + torch.sigmoid(model.focal_gate(c) + (model.focal_shift * surprise if shifted else 0)) * c
        if options.diffuse:
            gate = torch.sigmoid(model.diffuse_gate(c) - (model.diffuse_shift * surprise if shifted else 0))
            mixed = mixed + gate * past
        signals.append(model.expand(trn(model, mixed)))
        surprises.append(surprise)
        seen.append(c)
        deltas += [] if delta is None else [delta]
    return torch.stack(signals), surprises


def trn(model: Thalamus, y: torch.Tensor) -> torch.Tensor:
    if model.options.trn == "none":
        return y
    groups = y.split(2)
    activity = [(g.square().mean() + EPSILON).sqrt() for g in groups]
    if model.options.trn == "across":
        activity = [sum(activity) / len(activity)] * len(groups)
    parts = [g / (F.softplus(s) + a) for g, s, a in zip(groups, model.semisaturation[:, 0], activity)]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "options",
    [{}, {"surprise": "pred", "trn": "across"}, {"surprise": "none", "trn": "none"}, {"focal": False},
     {"diffuse": False, "clip": 0.4}],
    ids=str,
)  # fmt: skip
def test_all_documents_of_all_rows_at_once_are_the_token_loop(options: dict) -> None:
    model, x = router(**options), stream()
    relay = model(x, places_in_documents(SEGMENTS), several=True, before=None, kept=None)
    for row, segments in enumerate(SEGMENTS):
        for document in segments.unique():
            places = segments == document
            signals, surprises = token_loop(model, x[row, places])
            torch.testing.assert_close(relay.signal[row, places], signals, rtol=0, atol=1e-10)
            if relay.surprise is not None:
                expected = torch.tensor(surprises, dtype=torch.float64)
                torch.testing.assert_close(relay.surprise[row, places], expected, rtol=0, atol=1e-10)


def test_one_document_a_row_gives_the_same_by_a_plain_running_sum() -> None:
    model, x = router(), stream()
    plain = model(x, torch.arange(9), several=False, before=None, kept=None)
    marked = model(x, places_in_documents(torch.zeros(2, 9)), several=True, before=None, kept=None)
    torch.testing.assert_close(plain.signal, marked.signal, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_by_step_is_the_parallel_form(dtype: torch.dtype) -> None:
    model, x = router().to(dtype), stream(length=60).to(dtype)
    whole, before, parts = model(x, torch.arange(60), several=False, before=None, kept=None), None, []
    for place in range(60):
        relay = model(x[:, place : place + 1], torch.tensor([place]), several=False, before=before, kept=None)
        before = {name: values[:, -1:] for name, values in relay.trace.items()}
        parts.append(relay.signal)
    assert (torch.cat(parts, 1) - whole.signal).abs().max() < 1e-5


def test_sums_of_16_bit_activities_are_kept_in_32_bits() -> None:
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    for several in (False, True):
        sums = running_sums(ones, torch.zeros(1, 1, 1), torch.arange(1000), several=several)
        assert sums.dtype == torch.float32 and sums[0, -1, 0] == 1000


def test_another_documents_numbers_do_not_even_leave_a_rounding_error() -> None:
    x = torch.randn(1, 9, 2)
    large = x.clone()
    large[:, :6] *= 1e12
    places = places_in_documents(SEGMENTS[1:])
    first, second = (running_sums(v, torch.zeros(1, 1, 2), places, several=True)[:, 7:] for v in (x, large))
    assert torch.equal(first, second)


def test_a_surprise_opens_the_focal_and_closes_the_diffuse_path() -> None:
    model = Thalamus(hidden_size=12, options=ThalamusOptions(rank=6, groups=3))
    c, past = torch.ones(1, 1, 6), torch.full((1, 1, 6), 2.0)
    calm, alarmed = (model._mixed(c, past, torch.full((1, 1), a)) for a in (0.0, 3.0))
    model.focal_gate = None
    assert (model._mixed(c, past, torch.full((1, 1), 3.0)) < model._mixed(c, past, torch.zeros(1, 1))).all()
    assert (alarmed < calm).all() and (alarmed < 1.6).all(), "nearer to c than to the past"


def test_critics_learn_from_the_rows_that_count_alone() -> None:
    model, x = router(), stream()
    losses = [
        model(x, torch.arange(9), several=False, before=None, kept=kept).losses
        for kept in (torch.tensor([True, False]), None)
    ]
    alone = model(x[:1], torch.arange(9), several=False, before=None, kept=None).losses
    for name, value in alone.items():
        torch.testing.assert_close(losses[0][name], value)
        assert not torch.isclose(losses[1][name], value)


def test_critics_send_no_gradient_to_the_column() -> None:
    model, x = router(), stream().requires_grad_()
    losses = model(x, torch.arange(9), several=False, before=None, kept=None).losses
    assert sum(losses.values()).requires_grad
    assert torch.autograd.grad(sum(losses.values()), x, allow_unused=True) == (None,)


def test_competition_is_finite_where_nothing_is_active() -> None:
    model, silent = router(), torch.zeros(1, 1, 6, dtype=torch.float64, requires_grad=True)
    model.compete(silent).sum().backward()
    assert silent.grad.isfinite().all()
