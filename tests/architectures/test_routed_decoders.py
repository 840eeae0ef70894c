"""What MoETransformer and DeepSeekTransformer promise beyond the contract: costs, auxiliary loss, caches, options."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clplat.architectures.base import Architecture
from clplat.architectures.deepseek_transformer import DeepSeekTransformer
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.transformer import Transformer
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=29)
ROUTED = [MoETransformer, DeepSeekTransformer]


def build(kind: type[Architecture], **options) -> Architecture:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_size": 24, "num_experts": 4}
    return kind(spec=TEXT, **(sizes | options)).double().eval()


def batch_of(rows: int = 3, length: int = 16) -> Batch:
    inputs = torch.randint(29, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(inputs=inputs, targets=inputs)


def test_one_expert_and_no_routing_is_the_transformer() -> None:
    routed = build(MoETransformer, num_experts=1, experts_per_token=1, inner_size=96)
    plain = Transformer(spec=TEXT, hidden_size=32, num_layers=2, num_heads=4, mlp_ratio=3.0).double()
    weights = {name: value for name, value in routed.state_dict().items() if "mlp" not in name or "norm" in name}
    for number in range(2):
        weights[f"blocks.{number}.mlp.gate_up.weight"] = routed.blocks[number].mlp.gate_up[0]
        weights[f"blocks.{number}.mlp.down.weight"] = routed.blocks[number].mlp.down[0]
    plain.load_state_dict(weights)
    torch.testing.assert_close(routed(batch_of()).logits, plain(batch_of()).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "pair"), [(MoETransformer, 4 * 2 * (8 + 8)), (DeepSeekTransformer, 4 * 2 * (8 + 4 + 8))]
)
def test_flops_are_those_that_torch_counts_for_the_chosen_experts_and_half_of_attention(kind, pair: int) -> None:
    model = build(kind)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch_of(rows=1))
    # The last product of a mixture weighs the k answers of a token: 2·k·C, which is no product with a weight.
    weighing = 2 * (2 * 2 * 32) * 16
    skipped = 2 * pair * (16 * 16 - 16 * 17 // 2)
    assert model.flops_per_row() == counter.get_total_flops() - weighing - skipped


@pytest.mark.parametrize("kind", ROUTED)
def test_active_parameters_are_those_of_a_model_with_the_chosen_experts_alone(kind) -> None:
    model, chosen = build(kind), build(kind, num_experts=2)
    routers = 2 * 2 * 32
    assert model.active_parameters() == sum(p.numel() for p in chosen.parameters()) + routers


@pytest.mark.parametrize("kind", ROUTED)
def test_the_balance_losses_of_all_layers_are_summed(kind) -> None:
    assert set(build(kind)(batch_of()).losses) == {"balance"}
    with torch.no_grad():
        one, two = (build(kind, num_layers=layers, balance=0.1)(batch_of()).losses["balance"] for layers in (1, 2))
    assert 0.1 <= float(one) < 0.11
    assert 0.2 <= float(two) < 0.22


def test_latent_attention_caches_the_latent_and_one_rotary_key_alone() -> None:
    model = build(DeepSeekTransformer)
    _, state = model.decode(batch_of().inputs, model.init_state(3), torch.zeros(3, dtype=torch.long))
    assert [tuple(part.shape) for part in state[0]] == [(3, 16, 1, 32), (3, 16, 1, 4)]


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_decoding_runs_in_bfloat16(kind, weights: torch.dtype) -> None:
    model, row = build(kind).to(weights), batch_of(2).inputs
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        logits, state = model.decode(row[:, :9], model.init_state(2), torch.zeros(2, dtype=torch.long))
        logits, state = model.decode(row[:, 9:], state, torch.full((2,), 9))
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ROUTED)
def test_gradients_of_each_row_by_vmap_equal_those_one_by_one(kind) -> None:
    model, rows = build(kind), batch_of().inputs

    def loss(weights: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        inputs = row.unsqueeze(0)
        return functional_call(model, weights, (Batch(inputs=inputs, targets=inputs),)).logits.square().mean()

    weights = {name: value.detach() for name, value in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        together = vmap(grad(loss), in_dims=(None, 0))(weights, rows)
        alone = [grad(loss)(weights, row) for row in rows]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in alone]), rtol=1e-9, atol=1e-12)


def test_compiled_whole_it_gives_the_same_logits() -> None:
    model = build(DeepSeekTransformer, num_layers=1)
    compiled = torch.compile(lambda batch: model(batch).logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch_of()), model(batch_of()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, "{}.hidden_size: 30 is not a multiple of 2 \\* num_heads \\(8\\)"),
        ({"experts_per_token": 5}, "experts_per_token: 5 is not in 1..num_experts \\(4\\)"),
        ({"spec": Spec(kind="classify", input_shape=(4,), num_outputs=2)}, "{}: reads token rows.*use MLP"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(kind, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(kind.__name__)):
        kind(**({"spec": TEXT, "hidden_size": 32, "num_experts": 4} | options))


def test_latent_and_rotary_sizes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="DeepSeekTransformer.rotary_size: 3 is not a positive even number"):
        build(DeepSeekTransformer, rotary_size=3)
    with pytest.raises(ValueError, match="DeepSeekTransformer.latent_size: 0 is below 1"):
        build(DeepSeekTransformer, latent_size=0)
