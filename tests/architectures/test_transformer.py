"""The Transformer's own promises: grouped heads, relative positions, documents, caches, costs, options."""

from __future__ import annotations

import pytest
import torch
from token_rows import assert_reads_documents_alone, assert_reads_in_parts, batch_of, tokens
from torch.utils.flop_counter import FlopCounterMode

from clplat.architectures.layers import Attention, causal_document_mask, extend, rotary_angles, rotate
from clplat.architectures.transformer import Transformer
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=29)


def transformer(**options) -> Transformer:
    torch.manual_seed(0)
    return Transformer(spec=TEXT, hidden_size=32, num_layers=2, num_heads=4, **options).double().eval()


def test_rotated_scores_depend_on_the_distance_of_positions_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    angles = [rotary_angles(torch.tensor([place]), 8, 10_000.0) for place in (3, 7, 103, 107)]
    near, far = ((rotate(q, angles[i]) * rotate(k, angles[i + 1])).sum() for i in (0, 2))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(near, (q * k).sum())


def test_hidden_states_of_all_layers_begin_with_the_embeddings_and_end_with_the_input_of_the_head() -> None:
    model, batch = transformer(), batch_of(tokens(vocabulary=29))
    found, plain = model(batch, None, "all"), model(batch)
    assert found.hidden.shape == (2, 3, 16, 32) and plain.hidden.shape == (2, 16, 32)
    assert torch.equal(found.hidden[:, 0], model.embedding(batch.inputs)) and torch.equal(found.logits, plain.logits)
    assert torch.equal(found.hidden[:, -1], plain.hidden)
    angles = model._context(batch.inputs, None)
    assert torch.equal(found.hidden[:, 1], model.blocks[0](found.hidden[:, 0], *angles)[0])


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values() -> None:
    grouped = Attention(hidden_size=16, num_heads=4, num_kv_heads=2)
    full = Attention(hidden_size=16, num_heads=4, num_kv_heads=4)
    query, key, value = grouped.qkv.weight.detach().unflatten(0, (-1, 4)).split([4, 2, 2])
    repeated = torch.cat([query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)])
    full.qkv.weight.data, full.out.weight.data = repeated.flatten(0, 1), grouped.out.weight.data
    x, angles = torch.randn(2, 7, 16), rotary_angles(torch.arange(7), 4, 10_000.0)
    torch.testing.assert_close(grouped(x, angles, None), full(x, angles, None))


def test_one_document_a_row_needs_no_mask_and_two_are_kept_apart() -> None:
    assert causal_document_mask(torch.tensor([[4, 4, 4], [5, 5, 5]])) is None
    mask = causal_document_mask(torch.tensor([[0, 0, 1], [2, 2, 2]]))
    assert mask[:, 0].int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


def test_a_packed_document_is_read_as_if_it_stood_alone() -> None:
    assert_reads_documents_alone(transformer(), tokens(vocabulary=29), [[5, 11], [9, 7]], atol=1e-9)


def test_document_mask_off_reads_the_row_as_one_text() -> None:
    model, packed = transformer(document_mask=False), tokens(vocabulary=29)
    segments = (torch.arange(16) >= 5).long().expand(2, -1)
    assert torch.equal(model(batch_of(packed, segments)).logits, model(batch_of(packed)).logits)


def test_a_row_read_in_parts_with_carried_state_equals_one_pass() -> None:
    assert_reads_in_parts(transformer(num_kv_heads=2), tokens(vocabulary=29), [5, 1, 10], atol=1e-10)


def test_a_carried_state_refuses_document_marks() -> None:
    model, row = transformer(), tokens(vocabulary=29)
    with pytest.raises(ValueError, match="pass no segment_ids"):
        model(batch_of(row, torch.zeros_like(row)), model.init_state(2))


def test_decoding_goes_on_past_the_length_of_training_rows() -> None:
    model, long = transformer(), tokens(length=40, vocabulary=29)
    logits, state = model.decode(long[:, :39], model.init_state(2), torch.zeros(2, dtype=torch.long))
    logits, state = model.decode(long[:, 39:], state, torch.full((2,), 39))
    torch.testing.assert_close(logits[:, 0], model(batch_of(long)).logits[:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_decoding_runs_in_bfloat16(weights: torch.dtype) -> None:
    model, row = transformer(num_kv_heads=2).to(weights), tokens(vocabulary=29)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        logits, state = model.decode(row[:, :9], model.init_state(2), torch.zeros(2, dtype=torch.long))
        logits, state = model.decode(row[:, 9:], state, torch.full((2,), 9))
    assert logits.isfinite().all()


def test_a_cache_grows_and_the_one_passed_in_stays() -> None:
    past = torch.arange(4.0).view(2, 2, 1, 1)
    grown = extend(past, torch.tensor([[[[9.0]]], [[[8.0]]]]), torch.tensor([[1], [2]]))
    assert grown.flatten(1)[0, :2].tolist() == [0.0, 9.0]
    assert grown.flatten(1)[1].tolist() == [2.0, 3.0, 8.0]
    assert past.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("tie_head", [True, False])
def test_flops_are_those_that_torch_counts_and_half_of_its_attention(tie_head: bool) -> None:
    model = transformer(num_kv_heads=2, tie_head=tie_head)
    with FlopCounterMode(display=False) as counter:
        model(batch_of(tokens(rows=1, vocabulary=29)))
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if "attention" not in name)
    pairs = 16 * 17 // 2
    assert model.flops_per_row() == products + 2 * 4 * 32 * pairs


def test_the_tied_head_adds_no_parameter() -> None:
    tied, untied = (sum(p.numel() for p in transformer(tie_head=tie).parameters()) for tie in (True, False))
    assert untied - tied == 29 * 32


def test_first_predictions_are_near_uniform() -> None:
    probabilities = transformer()(batch_of(tokens(vocabulary=29))).logits.log_softmax(-1)
    assert (probabilities + torch.tensor(29.0).log()).abs().max() < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, "Transformer.hidden_size: 30 is not a multiple of 2 \\* num_heads \\(8\\)"),
        ({"num_kv_heads": 3}, "Transformer.num_kv_heads: 3 does not divide num_heads \\(4\\)"),
        ({"spec": Spec(kind="classify", input_shape=(4,), num_outputs=2)}, "kind 'classify'; use MLP"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(**({"spec": TEXT, "hidden_size": 32} | options))
