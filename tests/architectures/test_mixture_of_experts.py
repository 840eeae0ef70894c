"""The mixture of experts: all three forms equal every expert on every token, and no token disturbs another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clplat.architectures import mixture_of_experts
from clplat.architectures.mixture_of_experts import MixtureOfExperts, idle_weights


def layer(**options) -> MixtureOfExperts:
    torch.manual_seed(0)
    made = MixtureOfExperts(**({"hidden_size": 16, "inner_size": 24, "num_experts": 5} | options)).double()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return made


def tokens(count: int = 37) -> torch.Tensor:
    return torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def every_expert_on_every_token(experts: MixtureOfExperts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, without sorting: all E answers of a token, most of them times 0."""
    probability = (x @ experts.router.weight.T).softmax(-1)
    chosen = torch.zeros_like(probability).scatter(
        1, probability.argsort(descending=True)[:, : experts.experts_per_token], 1.0
    )
    weight = probability * chosen
    if experts.renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    answer = 0.0
    for number in range(experts.num_experts):
        gate, up = (x @ experts.gate_up[number].T).chunk(2, dim=-1)
        answer = answer + weight[:, number, None] * ((F.silu(gate) * up) @ experts.down[number].T)
    if experts.shared is not None:
        answer = answer + experts.shared(x)
    used = chosen.mean(0) / experts.experts_per_token
    return answer, experts.balance * experts.num_experts * (used * probability.mean(0)).sum()


def in_blocks(monkeypatch) -> None:
    monkeypatch.setattr(mixture_of_experts, "free_to_look", lambda tensor: False)


def by_grouped_mm(monkeypatch) -> None:
    """torch's function as on a card, but by its form for the CPU, which knows no float64."""
    in_blocks(monkeypatch)
    monkeypatch.setattr(mixture_of_experts, "_grouped_mm_fits", lambda x, down: True)


def by_slices(monkeypatch) -> None:
    pass


FORMS = [by_slices, in_blocks, by_grouped_mm]
ROUNDING = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def precision(form) -> torch.dtype:
    return torch.float32 if form is by_grouped_mm else torch.float64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts_per_token": 1},
        {"experts_per_token": 5},
        {"experts_per_token": 3, "renormalise": False},
        {"shared_experts": 2, "renormalise": False},
        {"num_experts": 1, "experts_per_token": 1},
    ],
)
def test_output_and_gradients_equal_every_expert_on_every_token(form, options: dict, monkeypatch) -> None:
    form(monkeypatch)
    experts, x = layer(**options), tokens()
    names = ["x", *(name for name, _ in experts.named_parameters())]
    probe = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def results(answer: torch.Tensor, loss: torch.Tensor, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        score = (answer * probe).sum() + 3.0 * loss
        slopes = torch.autograd.grad(score, (inputs, *experts.parameters()))
        return {"output": answer, "loss": loss} | dict(zip(names, slopes))

    expected = results(*every_expert_on_every_token(experts, x), x)
    experts, x = experts.to(precision(form)), x.detach().to(precision(form)).requires_grad_()
    found = results(*experts(x), x)
    for name, value in expected.items():
        close = torch.allclose(found[name].double(), value, **ROUNDING[precision(form)])
        assert close, f"{name} differs by {float((found[name] - value).detach().abs().max())}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 7, 37])
def test_an_expert_that_gets_all_tokens_drops_none(form, count: int, monkeypatch) -> None:
    form(monkeypatch)
    experts = layer(experts_per_token=1)
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.router.weight[3, 0] = 5.0
        x = tokens(count).abs()
        expected, _ = every_expert_on_every_token(experts, x)
        answer, _ = experts.to(precision(form))(x.to(precision(form)))
    torch.testing.assert_close(answer.double(), expected, **ROUNDING[precision(form)])
    assert bool(answer.abs().sum(-1).gt(0).all())


@pytest.mark.parametrize("form", FORMS)
def test_a_token_is_answered_alone_as_among_others(form, monkeypatch) -> None:
    form(monkeypatch)
    experts, x = layer().to(precision(form)), tokens().to(precision(form))
    alone = torch.cat([experts(row)[0] for row in x.split(1)])
    torch.testing.assert_close(experts(x)[0], alone, **ROUNDING[precision(form)])


def test_even_use_costs_the_coefficient_and_one_expert_for_all_costs_more() -> None:
    experts, x = layer(balance=0.01), tokens(40).detach().abs()
    with torch.no_grad():
        experts.router.weight.zero_()
        assert float(experts(x)[1]) == pytest.approx(0.01, rel=1e-12)
        experts.router.weight[2, :] = 9.0
        assert float(experts(x)[1]) > 0.02


def test_the_balance_loss_teaches_the_router_and_nothing_else() -> None:
    experts = layer(shared_experts=1)
    loss = experts(tokens().detach())[1]
    loss.backward()
    assert [name for name, weight in experts.named_parameters() if weight.grad is not None] == ["router.weight"]


def test_three_axes_give_the_same_as_tokens_in_a_row() -> None:
    experts, x = layer(), tokens(36)
    assert torch.equal(experts(x.view(4, 9, 16))[0].view(36, 16), experts(x)[0])


def test_idle_weights_are_those_of_the_experts_not_chosen() -> None:
    experts = layer(shared_experts=1)
    assert idle_weights(torch.nn.Sequential(experts, torch.nn.Linear(3, 3))) == 3 * (3 * 16 * 24)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_close_and_autocast_works_in_bfloat16(form, weights: torch.dtype, monkeypatch) -> None:
    form(monkeypatch)
    experts, x = layer(shared_experts=1).to(weights), tokens().detach().to(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        answer, loss = experts(x)
    (answer.float().square().mean() + loss).backward()
    expected = every_expert_on_every_token(experts.double(), x.double())[0].detach()
    assert answer.dtype == torch.bfloat16
    # Half a percent of the typical size for rounding inputs; a token whose choice flips would move it by its own size.
    assert float((answer.detach() - expected).abs().mean() / expected.abs().mean()) < 0.02


def test_compiled_whole_it_gives_the_same_output_and_gradients() -> None:
    experts, x = layer(shared_experts=1), tokens()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for call in (experts, compiled):
        answer, loss = call(x)
        (answer.square().mean() + loss).backward()
        if call is experts:
            expected = [answer.detach(), *(weight.grad.clone() for weight in experts.parameters())]
            experts.zero_grad()
    found = [answer.detach(), *(weight.grad for weight in experts.parameters())]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_per_token": 6}, "experts_per_token: 6 is not in 1..num_experts \\(5\\)"),
        ({"experts_per_token": 0}, "experts_per_token: 0 is not in"),
        ({"inner_size": 0}, "inner_size: 0 is below 1"),
        ({"num_experts": 0}, "num_experts: 0 is below 1"),
        ({"shared_experts": -1}, "shared_experts: -1 is negative"),
        ({"balance": -0.1}, "balance: -0.1 is negative"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**options)
