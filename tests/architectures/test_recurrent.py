"""Recurrent classifiers: the leaky RNN is the paper's equations, and its constraints hold while it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clplat.architectures.recurrent import GRU, LSTM, LeakyRNN
from clplat.architectures.timescales import autocorrelations, network_timescales
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

BITS = Spec(kind="classify", input_shape=(14,), num_outputs=2, scenario="domain", vocab_size=3, pad_token=2, heads=3)


def built(cls: type = LeakyRNN, **options) -> LeakyRNN:
    torch.manual_seed(0)
    return cls(**({"spec": BITS, "hidden_size": 12} | options)).double()


def bits(lengths: list[int], width: int = 14) -> Batch:
    tokens = torch.randint(2, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(width) >= torch.tensor(lengths).unsqueeze(1)] = 2
    targets = torch.randint(2, (len(lengths), 3), generator=torch.Generator().manual_seed(2))
    return Batch(inputs=tokens, targets=targets)


def token_loop(model: LeakyRNN, batch: Batch) -> torch.Tensor:
    """The paper's update written out for one row, one token and one unit's equation at a time; logits (B, heads, C)."""
    weight = model.recurrent.weight - torch.diag(torch.diag(model.recurrent.weight))
    answers = []
    for tokens in batch.inputs.tolist():
        h = torch.full((model.hidden_size,), model.initial_noise / 2, dtype=torch.float64)
        for token in (t for t in tokens if t != 2):
            summed = weight @ h + model.recurrent.bias + model.drive.weight[:, 0] * token + model.drive.bias
            if model.leak == "inside":
                h = F.leaky_relu((1 - 1 / model.tau) * h + summed / model.tau)
            else:
                h = (1 - 1 / model.tau) * h + F.leaky_relu(summed) / model.tau
        answers.append(model.head(h).view(3, 2))
    return torch.stack(answers)


@pytest.mark.parametrize("leak", ["inside", "outside"])
@pytest.mark.parametrize("lengths", [[14, 14, 14], [6, 6], [3, 14, 9, 1]], ids=["full", "short", "ragged"])
def test_the_leaky_rnn_is_the_token_loop_with_all_its_gradients(leak, lengths):
    model, batch = built(leak=leak).eval(), bits(lengths)
    with torch.no_grad():
        model.recurrent.weight.fill_diagonal_(3.0)  # even then there are no self-connections
    found, expected = model(batch).logits, token_loop(model, batch)
    assert float((found - expected).abs().max().detach()) <= 1e-12
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(logits.square().sum(), weights) for logits in (found, expected))
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= 1e-10 * max(1.0, float(other.abs().max())), name


def trained(model: LeakyRNN, steps: int, **options) -> LeakyRNN:
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01} | options))
    for _ in range(steps):
        optimizer.zero_grad()
        batch = bits([14, 9, 5, 14])
        F.cross_entropy(model(batch).logits.flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
        model.step_end(None)
    return model


def test_no_unit_connects_to_itself_before_and_after_training():
    model = built()
    before = model.recurrent.weight.detach().clone()
    trained(model, 20)
    assert not torch.equal(before, model.recurrent.weight)
    for weight in (before, model.recurrent.weight):
        assert torch.equal(torch.diag(weight), torch.zeros(12, dtype=torch.float64))


def test_a_step_below_one_leaves_tau_at_one_and_a_later_step_may_raise_it_again():
    model = built()
    for pull, expected in ((1.0, 1.0), (-0.25, 1.25)):
        model.tau.grad = torch.full_like(model.tau, pull)
        torch.optim.SGD([model.tau], lr=1.0 if pull < 0 else 10.0).step()
        model.step_end(None)
        assert torch.equal(model.tau, torch.full_like(model.tau, expected))
    with torch.no_grad():
        model.tau.fill_(1.0)
    model(bits([14])).logits.sum().backward()
    assert bool((model.tau.grad != 0).all())


def test_tau_begins_between_one_and_two_and_stays_at_least_one_while_it_learns():
    model = built(hidden_size=200)
    assert bool(((model.tau >= 1) & (model.tau <= 2)).all())
    before = model.tau.detach().clone()
    trained(model, 20)
    assert bool((model.tau >= 1).all()) and bool((model.tau == 1).any())
    assert not torch.equal(before, model.tau)


def test_a_fixed_tau_is_that_of_all_units_and_is_not_trained():
    model = trained(built(fixed_tau=2.5), 3)
    assert torch.equal(model.tau, torch.full((12,), 2.5, dtype=torch.float64))
    assert "tau" not in dict(model.named_parameters())


def test_rows_begin_from_noise_of_the_global_source_in_training_and_from_its_mean_in_evaluation():
    model = built(initial_noise=0.4)
    first, second = model.init_state(1000), model.init_state(1000)
    assert not torch.equal(first, second)
    assert 0 <= float(first.min()) < 0.01 and 0.39 < float(first.max()) <= 0.4
    torch.manual_seed(5)
    noisy = model(bits([14])).logits
    torch.manual_seed(5)
    assert torch.equal(noisy, model(bits([14])).logits)
    before = torch.get_rng_state()
    assert torch.equal(model.eval().init_state(3), torch.full((3, 12), 0.2, dtype=torch.float64))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("leak", ["inside", "outside"])
def test_reading_on_from_a_state_is_reading_the_whole_row(leak):
    model, batch = built(leak=leak).eval(), bits([14, 14])
    half = model(batch.replaced(inputs=batch.inputs[:, :5]))
    rest = model(batch.replaced(inputs=batch.inputs[:, 5:]), half.state)
    assert float((rest.logits - model(batch).logits).abs().max().detach()) <= 1e-12


@pytest.mark.parametrize("cls", [LeakyRNN, LSTM, GRU])
def test_the_last_activity_of_a_row_is_what_it_is_answered_from(cls):
    model, batch = built(cls).eval(), bits([14, 14])
    found = model.head(model.activity(model.input(batch.inputs))[-1]).view(2, 3, 2)
    assert float((found - model(batch).logits).abs().max().detach()) <= 1e-12


def test_bits_are_read_as_numbers_and_other_tokens_have_lines_of_their_own():
    assert torch.equal(built().input(torch.tensor([[0, 1, 2]])).squeeze(-1), torch.tensor([[0.0, 1.0, 0.0]]).double())
    words = Spec(kind="classify", input_shape=(5,), num_outputs=2, scenario="domain", vocab_size=4, pad_token=1)
    read = built(spec=words).input(torch.tensor([[0, 1, 2, 3]]))
    assert torch.equal(read, torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]).double())


def decaying(*, taus: list[float], steps: int = 20_000) -> torch.Tensor:
    """Trials (T, 8, len(taus)) of processes whose autocorrelation decays with these time constants."""
    keep = torch.exp(-1 / torch.tensor(taus, dtype=torch.float64))
    noise = torch.randn(steps, 8, len(taus), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = torch.empty_like(noise)
    held = torch.zeros(8, len(taus), dtype=torch.float64)
    for step in range(steps):
        held = keep * held + (1 - keep.square()).sqrt() * noise[step]
        values[step] = held
    return values


def test_network_timescales_are_those_of_processes_with_known_ones():
    values = decaying(taus=[0.8, 3.0, 12.0])
    found = network_timescales(values)
    assert torch.allclose(found, torch.tensor([0.8, 3.0, 12.0], dtype=torch.float64), rtol=0.1), found
    mixed = network_timescales(values[..., :1] + values[..., 2:])  # two in equal parts
    assert torch.allclose(mixed, torch.tensor([6.4], dtype=torch.float64), rtol=0.1), mixed


def test_autocorrelation_is_one_at_lag_zero_and_undefined_for_a_unit_that_never_changes():
    values = decaying(taus=[2.0, 2.0], steps=500)
    values[..., 1] = 0.3
    found = autocorrelations(values, lags=4)
    assert found[0, 0] == 1 and bool(found[:, 1].isnan().all())
    plain = values[..., 0] - values[..., 0].mean(0)
    expected = sum(float((plain[: 500 - 3, b] * plain[3:, b]).sum()) for b in range(8)) / (8 * 497)
    assert abs(float(found[3, 0]) - expected / float(plain.square().mean())) < 1e-12
    assert network_timescales(values).isnan().tolist() == [False, True]


def test_measurements_are_tau_and_where_asked_for_tau_net_and_the_same_each_time():
    model = built(measured_steps=4000)
    assert model.measurements() == model.measurements()
    assert model.measurements().keys() == {"tau_mean", "tau_median", "tau_net_mean", "tau_net_median"}
    assert model.measurements()["tau_mean"] == float(model.tau.mean().detach())
    assert built().measurements().keys() == {"tau_mean", "tau_median"}
    assert built(LSTM, measured_steps=4000).measurements().keys() == {"tau_net_mean", "tau_net_median"}
    assert built(GRU).measurements() == {}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (LeakyRNN, {"fixed_tau": 0.5}, "LeakyRNN.fixed_tau: .* at the fastest, τ = 1; got 0.5"),
        (LeakyRNN, {"initial_noise": -1.0}, "LeakyRNN.initial_noise: .*at least 0"),
        (LeakyRNN, {"hidden_size": 0}, "LeakyRNN.hidden_size: at least 1"),
        (LSTM, {"embedding_size": 0}, "LSTM.embedding_size: at least 1"),
        (GRU, {"measured_steps": 10}, "GRU.measured_steps: 0, or at least 2000"),
        (GRU, {"spec": Spec(kind="language", input_shape=(5,), num_outputs=7)}, "GRU: reads padded token rows"),
    ],
)
def test_a_bad_option_is_refused_by_name(cls, options, message):
    with pytest.raises(ValueError, match=message):
        built(cls, **options)
