"""Pretrained models: they hold the contract, continue prompts as transformers does, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CONTEXT, END, VOCABULARY, model_folder
from torch._dynamo.utils import counters

from clplat.architectures.contract import CHECKS
from clplat.architectures.generation import greedy
from clplat.architectures.lora import LoRA
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.probing import Contract
from clplat.objective import Objective
from clplat.streams.base import Spec
from clplat.streams.batch import CURRENT, IGNORE, REPLAY, Batch

SPEC = Spec(kind="language", input_shape=(12,), num_outputs=VOCABULARY, end_token=END)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EAGER: dict[str, Any] = {"attention": "eager", "gradient_checkpointing": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-at-targets": ("llama", {"logits": "targets"}),
    "llama-lora": ("llama", {"lora": LoRA(rank=16, alpha=32, dropout=0.1, targets=LINEAR), **EAGER}),
    "gpt2": ("gpt2", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {kind: model_folder(parent, kind) for kind in ("llama", "gpt2", "mixtral", "mamba")}


def made(folder: Path, **options: Any) -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(spec=options.pop("spec", SPEC), name=str(folder), **options)


def batch(length: int = 12, rows: int = 3) -> Batch:
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(inputs=tokens, targets=tokens.clone())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_contract(folders: dict[str, Path], kind: str, check: Any) -> None:
    name, options = KINDS[kind]
    check(Contract(factory=lambda spec: made(folders[name], **options), spec=SPEC, gradient_steps=3, overfit_steps=300))


def test_greedy_continuations_of_unequal_prompts_equal_those_of_transformers_one_by_one(
    folders: dict[str, Path],
) -> None:
    model = made(folders["llama"]).double().eval()
    prompts = [[5, 9, 30], [7], [11, 12, 13, 14, 15, 40, 8]]
    found = greedy(model, prompts, max_new_tokens=9, stop=END)
    for prompt, continuation in zip(prompts, found, strict=True):
        given = torch.tensor([prompt])
        whole = model.backbone.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=9, do_sample=False, pad_token_id=0
        )  # fmt: skip
        expected = whole[0, len(prompt) :].tolist()
        assert continuation == (expected[: expected.index(END)] if END in expected else expected)
    assert any(found)


def test_leaving_out_padding_changes_no_logit_in_front_of_the_last_target(folders: dict[str, Path]) -> None:
    rows = batch()
    rows.targets[:, 8:] = IGNORE
    whole, part = (made(folders["llama"], skip_padding=skip).eval() for skip in (False, True))
    with torch.no_grad():
        expected, found = whole(rows, return_hidden="all"), part(rows, return_hidden="all")
    assert found.logits.shape == expected.logits.shape == (3, 12, VOCABULARY)
    torch.testing.assert_close(found.logits[:, :8], expected.logits[:, :8])
    torch.testing.assert_close(found.hidden[:, :, :8], expected.hidden[:, :, :8])
    assert not found.logits[:, 8:].any() and bool(expected.logits[:, 8:].any())


def test_a_head_at_targets_alone_gives_their_logits_losses_and_gradients(folders: dict[str, Path]) -> None:
    rows, objective = batch(), Objective(SPEC, [])
    rows.targets[0, :3], rows.targets[1, 1:], rows.targets[:, 8:] = IGNORE, IGNORE, IGNORE
    mixed = rows.replaced(origin=torch.tensor([CURRENT, REPLAY, CURRENT]), weight=torch.tensor([1.0, 0.5, 1.0]))
    found = []
    for places in ("all", "targets"):
        model = made(folders["llama"], logits=places).double().eval()
        output = model(rows, return_hidden="last")
        (objective(output, rows) + objective.by_origin(model(mixed), mixed).sum()).backward()
        gradients = [p.grad for p in model.parameters()]
        found.append((output, objective.row_loss(output, rows), gradients))
    (whole, whole_loss, expected), (part, part_loss, got) = found
    counted = rows.targets != IGNORE
    torch.testing.assert_close(part.logits[counted], whole.logits[counted])
    assert part.logits.shape == whole.logits.shape and not part.logits[~counted].any()
    assert part.predicted.tolist() == counted.flatten().nonzero().flatten().tolist() and whole.predicted is None
    torch.testing.assert_close(part_loss, whole_loss)
    torch.testing.assert_close(part.hidden, whole.hidden)
    torch.testing.assert_close(got, expected)


def test_where_nothing_is_predicted_and_in_decoding_the_head_reads_all(folders: dict[str, Path]) -> None:
    model, rows = made(folders["llama"], logits="targets").eval(), batch()
    nothing = rows.replaced(targets=torch.full_like(rows.targets, IGNORE))
    with torch.no_grad():
        assert model(nothing).predicted is None and bool(model(nothing).logits.any(-1).all())
        assert bool(model.decode(rows.inputs, model.init_state(3), torch.zeros(3, dtype=torch.long))[0].any(-1).all())
    with pytest.raises(ValueError, match="logits: must be all, or targets beside skip_padding: true"):
        made(folders["llama"], logits="targets", skip_padding=False)


def test_hidden_states_are_embeddings_then_layers_and_last_what_the_head_reads(folders: dict[str, Path]) -> None:
    model, rows = made(folders["llama"]).eval(), batch()
    with torch.no_grad():
        output, last = model(rows, return_hidden="all"), model(rows, return_hidden="last").hidden
        assert output.hidden.shape == (3, 3, 12, 32) and torch.equal(output.hidden[:, -1], last)
        assert torch.equal(output.hidden[:, 0], model.backbone.get_input_embeddings()(rows.inputs))
        assert torch.equal(model.backbone.lm_head(last), output.logits)


def test_checkpointed_layers_give_the_same_gradients(folders: dict[str, Path]) -> None:
    found = []
    for saving in (False, True):
        model = made(folders["llama"], lora=LoRA(targets=LINEAR, dropout=0.0), gradient_checkpointing=saving).train()
        with torch.no_grad():
            for tensor in model.adapter_parameters("default").values():
                tensor.add_(0.01)
        model(batch()).logits.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_layers_are_one_graph_for_rows_and_tokens_of_any_number_and_leave_out_what_uncompiled_ones_do(
    folders: dict[str, Path],
) -> None:
    objective, found = Objective(SPEC, []), []
    torch.compiler.reset()
    counters.clear()
    for compiled in (False, True):
        model = made(folders["llama"], lora=LoRA(targets=LINEAR, dropout=0.0), logits="targets", compiled=compiled)
        with torch.no_grad():
            for tensor in model.adapter_parameters("default").values():
                tensor.add_(0.01)
        model.train()
        for length, rows in ((12, 3), (9, 4), (10, 2)):
            rows_at = batch(length, rows)
            rows_at.targets[:, 7:], rows_at.targets[0, :3] = IGNORE, IGNORE
            output = model(rows_at)
            objective(output, rows_at).backward()
        written = greedy(model.eval(), [[3, 4, 5], [6, 7]], max_new_tokens=3, stop=END)
        found.append((output.logits, [p.grad for p in model.parameters() if p.requires_grad], written))
    assert not found[1][0][:, 7:].any() and all(gradient.any() for gradient in found[1][1])
    torch.testing.assert_close(found[0], found[1])
    # Of the first layer, whose input has no gradient, and of all others.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_adapters_beside_16_bit_weights_are_kept_in_float32(folders: dict[str, Path]) -> None:
    model = made(folders["llama"], dtype="bfloat16", lora=LoRA())
    assert {p.dtype for p in model.adapter_parameters("default").values()} == {torch.float32}
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    model(batch()).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.adapter_parameters("default").values())


def test_operations_and_active_weights_are_counted_by_hand(folders: dict[str, Path]) -> None:
    model, tokens = made(folders["llama"]), 12
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    pairs = tokens * (tokens + 1) / 2
    assert model.flops_per_row() == 2 * tokens * (2 * layer + 32 * VOCABULARY) + 4 * 32 * pairs * 2
    routed = made(folders["mixtral"])
    experts = sum(p.numel() for name, p in routed.named_parameters() if ".experts." in name)
    assert experts and routed.active_parameters() == sum(p.numel() for p in routed.parameters()) - experts // 2


def test_a_model_that_takes_no_mask_refuses_packed_documents_by_the_name_of_the_field(folders: dict[str, Path]) -> None:
    model, rows = made(folders["mamba"], attention="eager"), batch()
    assert model(rows).logits.isfinite().all()
    segments = torch.zeros_like(rows.inputs)
    segments[:, 6:] = 1
    with pytest.raises(ValueError, match="batch.segment_ids: several documents.*MambaForCausalLM"):
        model(rows.replaced(segment_ids=segments))
    with pytest.raises(ValueError, match="generation from prompts.*MambaForCausalLM"):
        greedy(model, [[5, 6]], max_new_tokens=2, stop=None)
    assert (
        made(folders["mamba"], attention="eager", document_mask=False)(rows.replaced(segment_ids=segments))
        .logits.isfinite()
        .all()
    )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"spec": Spec(kind="classify", input_shape=(3,), num_outputs=2)}, "reads token rows.*'classify'"),
        ("llama", {"spec": Spec(kind="language", input_shape=(33,), num_outputs=60)}, "33 tokens do not fit.*32 tok"),
        ("llama", {"spec": Spec(kind="language", input_shape=(9,), num_outputs=257)}, "knows 60 tokens.*257.*own"),
        ("llama", {"spec": Spec(kind="language", input_shape=(9,), num_outputs=50)}, "knows 60 tokens.*tokenizer 50"),
        (
            "llama",
            {"spec": Spec(kind="language", input_shape=(9,), num_outputs=60, end_token=7)},
            "end in token 2, and the stream's in 7",
        ),
        ("gpt2", {"lora": LoRA(targets=["c_attn"])}, "'c_attn' holds several.*its linear layers are c_fc, c_proj"),
        ("gpt2", {"lora": LoRA()}, "no layer of GPT2LMHeadModel is called 'q_proj'; its linear layers are c_fc, c_p"),
        ("gpt2", {"lora": LoRA(targets=["ln_1"])}, "'ln_1' is a LayerNorm, not a linear layer"),
        ("mixtral", {"lora": LoRA(targets=["gate_up_proj"])}, "'gate_up_proj' names experts of Mixtral"),
        ("llama", {"lora": LoRA(targets=["query"])}, "called 'query'; its linear layers are down_proj, gate_proj"),
        ("mamba", {}, "does not run with sdpa; use eager"),
        ("llama", {"dtype": "float8"}, "dtype: must be one of float32, bfloat16, float16"),
        ("llama", {"gguf_file": "none.gguf"}, "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(
    folders: dict[str, Path], kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made(folders[kind], **options)


def test_adapters_stand_beside_the_transposed_layers_of_gpt2_as_their_product_in_the_weights_would(
    folders: dict[str, Path],
) -> None:
    whole, model = made(folders["gpt2"]).eval(), made(folders["gpt2"], lora=LoRA(targets=["c_proj", "c_fc"])).eval()
    tensors = model.adapter_parameters("default")
    with torch.no_grad():
        for name, factor in tensors.items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(factor, std=0.1)
                path = name.removesuffix(".lora_B")
                change = model.lora.scale * factor @ tensors[f"{path}.lora_A"]
                whole.backbone.get_submodule(path).weight.add_(change.T)
        moved = model(batch()).logits
        torch.testing.assert_close(moved, whole(batch()).logits, rtol=1e-4, atol=1e-4)
        with model.answering():
            assert (model(batch()).logits - moved).abs().max() > 0.01


def test_a_wrong_folder_and_an_unset_variable_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder /nowhere"):
        made(Path("/nowhere"))
    with pytest.raises(ValueError, match="cannot be loaded.*no config.json"):
        made(tmp_path)
    with pytest.raises(ValueError, match="environment variable NO_SUCH_PLACE"):
        made(Path("${NO_SUCH_PLACE}/model"))


def test_pickled_weights_are_not_opened_unless_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    state = made(folders["llama"]).backbone.state_dict()
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pickled \(pytorch_model.bin\), and reading them can run code: set allow_pickle"
    ):
        made(tmp_path)
    assert made(tmp_path, allow_pickle=True).checksum == made(folders["llama"]).checksum


def test_prompts_beyond_the_context_are_refused_with_both_lengths(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=f"33 tokens do not fit the context of .*, {CONTEXT} tokens"):
        greedy(made(folders["llama"]).eval(), [[5] * 30], max_new_tokens=5, stop=None)
