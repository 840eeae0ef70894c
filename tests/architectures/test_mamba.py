"""Mamba's own promises: its start, documents, carried state, rows of unequal length, costs, options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from token_rows import assert_reads_documents_alone, assert_reads_in_parts, batch_of, tokens
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from clplat.architectures.mamba import Mamba
from clplat.kernels.selective_scan import token_loop
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=29)


def mamba(**options) -> Mamba:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "state_size": 8}
    return Mamba(spec=TEXT, **(sizes | options)).double().eval()


def test_the_mixing_layer_is_the_one_of_the_paper_written_token_by_token() -> None:
    layer = mamba(num_layers=1).blocks[0].attention
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    inner, gate = (x @ layer.project.weight.T).chunk(2, dim=-1)
    convolved = F.conv1d(
        F.pad(inner.transpose(1, 2), (3, 0)), layer.conv_weight.T.unsqueeze(1), layer.conv_bias, groups=64
    )
    u = F.silu(convolved.transpose(1, 2))
    rank, b, c = (u @ layer.select.weight.T).split([2, 8, 8], dim=-1)
    step = F.softplus(rank @ layer.step.weight.T + layer.step.bias)
    answers, _ = token_loop(u, step, -layer.log_rate.exp(), b, c, x.new_zeros(2, 8, 64), x.new_ones(2, 9))
    expected = ((answers + layer.skip * u) * F.silu(gate)) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, None), expected, rtol=0, atol=1e-12)


def test_it_starts_with_the_rates_and_steps_of_the_authors() -> None:
    layer = mamba(hidden_size=256).blocks[1].attention
    torch.testing.assert_close(
        layer.log_rate.exp(), torch.arange(1.0, 9.0, dtype=torch.float64).unsqueeze(1).expand(8, 512)
    )
    steps = F.softplus(layer.step.bias.detach())
    assert 0.00099 < float(steps.min()) < 0.0015
    assert 0.08 < float(steps.max()) < 0.101
    assert float(steps.log().mean()) == pytest.approx(-4.6, abs=0.2)
    assert layer.step.weight.abs().max() <= 0.25
    assert layer.conv_weight.abs().max() <= 0.5


def test_a_packed_document_is_read_as_if_it_stood_alone() -> None:
    assert_reads_documents_alone(mamba(), tokens(vocabulary=29), [[5, 1, 10], [9, 7]], atol=1e-12)


def test_document_mask_off_reads_the_row_as_one_text() -> None:
    model, packed = mamba(document_mask=False), tokens(vocabulary=29)
    segments = (torch.arange(16) >= 5).long().expand(2, -1)
    assert torch.equal(model(batch_of(packed, segments)).logits, model(batch_of(packed)).logits)


def test_a_row_read_in_parts_with_carried_state_equals_one_pass() -> None:
    assert_reads_in_parts(mamba(), tokens(vocabulary=29), [5, 1, 10], atol=1e-10)


def test_decoding_keeps_a_state_of_one_size_however_much_was_read() -> None:
    model, sizes = mamba(), []
    state, lengths = model.init_state(2), torch.zeros(2, dtype=torch.long)
    for token in tokens(length=5, vocabulary=29).split(1, dim=1):
        _, state = model.decode(token, state, lengths)
        lengths = lengths + 1
        sizes.append([part.shape for part in state[0]])
    assert all(size == sizes[0] for size in sizes)


@pytest.mark.parametrize("conv_width", [1, 2, 6])
def test_a_row_continues_where_its_own_tokens_end_and_not_after_its_padding(conv_width: int) -> None:
    model, row = mamba(conv_width=conv_width), tokens(3, vocabulary=29)
    lengths = torch.tensor([2, 7, 4])
    _, state = model.decode(row[:, :7], model.init_state(3), torch.zeros(3, dtype=torch.long))
    for _ in range(2):  # several tokens at once, padding among them again
        given = torch.stack([row[place, end : end + 3] for place, end in enumerate(lengths.tolist())])
        logits, state = model.decode(given, state, lengths)
        for place, end in enumerate(lengths.tolist()):
            expected = model(batch_of(row[place : place + 1, : end + 3])).logits[0, -3:]
            torch.testing.assert_close(logits[place], expected, rtol=0, atol=1e-10)
        lengths = lengths + torch.tensor([1, 0, 3])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_decoding_runs_in_bfloat16_with_a_precise_state(weights: torch.dtype) -> None:
    model, row = mamba(mlp_size=32).to(weights), tokens(vocabulary=29)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        logits, state = model.decode(row[:, :9], model.init_state(2), torch.zeros(2, dtype=torch.long))
        logits, state = model.decode(row[:, 9:], state, torch.full((2,), 9))
    assert logits.isfinite().all()
    assert state[0][1].dtype == torch.float32


def test_gradients_of_each_row_by_vmap_equal_those_one_by_one() -> None:
    model, rows = mamba(num_layers=1), tokens(3, vocabulary=29)

    def loss(weights: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, weights, (batch_of(row.unsqueeze(0)),)).logits.square().mean()

    weights = {name: value.detach() for name, value in model.named_parameters()}
    together = vmap(grad(loss), in_dims=(None, 0))(weights, rows)
    for place, row in enumerate(rows):
        model.zero_grad()
        model(batch_of(row.unsqueeze(0))).logits.square().mean().backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(together[name][place], value.grad, rtol=1e-9, atol=1e-12)


def test_flops_are_those_that_torch_counts_and_the_scan_by_hand() -> None:
    model = mamba(mlp_size=40)
    with FlopCounterMode(display=False) as counter:
        model(batch_of(tokens(rows=1, vocabulary=29)))
    # torch counts products with weights; neither the scan, one operator to it, nor the convolution.
    by_hand = 2 * 16 * (64 * 8 * (2 + 5) + 2 * 4 * 64)
    assert model.flops_per_row() == counter.get_total_flops() + by_hand


def test_options_that_do_not_fit_are_refused_by_name() -> None:
    for name in ("expand", "state_size", "conv_width", "mlp_size"):
        with pytest.raises(ValueError, match=f"Mamba.{name}: 0 is below 1"):
            mamba(**{name: 0})
    with pytest.raises(ValueError, match="Mamba: reads token rows.*use MLP"):
        Mamba(spec=Spec(kind="classify", input_shape=(4,), num_outputs=2))
