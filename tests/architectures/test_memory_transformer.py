"""A decoder of memory layers: documents, decoding in parts, stability, options, costs and the record's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from studies import run_folder, study
from token_rows import assert_reads_documents_alone, assert_reads_in_parts, batch_of, tokens
from torch.utils.flop_counter import FlopCounterMode

from clplat.architectures.associative_memory.caching import MemoryCaching
from clplat.architectures.associative_memory.lact import LaCT
from clplat.architectures.associative_memory.miras import Memora, Moneta, Yaad
from clplat.architectures.associative_memory.mixer import MemoryMixer, ProjectionOptions
from clplat.architectures.associative_memory.operations import MatrixOperation, MLPOperation
from clplat.architectures.associative_memory.presets import (
    TTTMLP,
    Atlas,
    DeltaNet,
    GatedDeltaNet,
    LayerKind,
    LinearAttention,
    MemoryLayer,
    OmegaNet,
    TitansLMM,
    TTTLinear,
)
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import Tokens
from clplat.architectures.associative_memory.titans_presets import TitansMAC, TitansMAG, TitansMAL
from clplat.architectures.associative_memory.tnt import TNT
from clplat.architectures.hope.presets import SelfModifyingTitans
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.architectures.mlp import MLP
from clplat.components import Component, build, checked
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import read
from clplat.streams.base import Spec
from clplat.study_file import expand, load_study

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=23)
TITANS = TitansLMM(num_heads=2, chunk=2, expand=2)
KINDS: list[LayerKind] = [
    LinearAttention(chunk=4), DeltaNet(chunk=4), GatedDeltaNet(chunk=4), TTTLinear(chunk=4), TTTMLP(chunk=4, expand=2),
    TitansLMM(chunk=4, expand=2), Moneta(chunk=4, expand=2), Yaad(chunk=4, expand=2), Memora(chunk=4, expand=2),
    LaCT(chunk=4), OmegaNet(chunk=4, window=6, expand=2, rank=8), Atlas(chunk=4, window=6, expand=2, rank=8),
    AttentionLayer(num_heads=2),
    MemoryCaching(layer=TITANS, segment=4), MemoryCaching(layer=TITANS, segment=4, read="soup", start="warm"),
    TNT(layer=TITANS, global_chunk=6, local_chunks=[2, 4], shard=4), TNT(layer=DeltaNet(), global_chunk=5, shard=8),
    TitansMAC(layer=TITANS, segment=4), TitansMAG(layer=TITANS, window=5), TitansMAL(layer=TITANS, window=3),
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)


def model(*layers: LayerKind, **options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(spec=TEXT, hidden_size=16, layers=layers, mlp_ratio=2.0, **options).double().eval()


@every_kind
def test_a_packed_document_is_read_as_if_it_stood_alone(kind: LayerKind) -> None:
    if isinstance(kind, AttentionLayer):
        kind = MemoryLayer(num_heads=2)  # positions of packed documents are attention's own matter
    assert_reads_documents_alone(model(kind, kind), tokens(), [[5, 1, 10], [9, 7]], atol=1e-11)


@every_kind
def test_a_row_read_in_parts_with_carried_state_equals_one_pass(kind: LayerKind) -> None:
    made = model(kind, TitansLMM(chunk=3, expand=2), kind)
    assert_reads_in_parts(made, tokens(), [5, 1, 1, 9], atol=1e-10)


@every_kind
def test_no_tokens_are_answered_by_nothing_and_leave_the_state_as_it_is(kind: LayerKind) -> None:
    made, rows = model(kind), tokens(length=7)
    whole = made(batch_of(rows)).logits
    none = made(batch_of(rows[:, :0]), return_hidden="all")
    assert none.logits.shape == (2, 0, 23) and none.hidden.shape == (2, 2, 0, 16)
    state, parts = made.init_state(2), []
    for start, stop in ((0, 0), (0, 4), (4, 4), (4, 5), (5, 5), (5, 5), (5, 7)):
        logits, after = made.decode(rows[:, start:stop], state, torch.full((2,), start))
        assert logits.shape == (2, stop - start, 23)
        assert stop > start or after is state
        state = after
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    assert made(batch_of(rows[:, :0]), state).logits.shape == (2, 0, 23)


def test_a_state_does_not_grow_with_what_was_read() -> None:
    made, sizes = model(TitansLMM(chunk=3), DeltaNet()), []
    state, lengths = made.init_state(2), torch.zeros(2, dtype=torch.long)
    for token in tokens(length=7).split(1, dim=1):
        _, state = made.decode(token, state, lengths)
        lengths = lengths + 1
        sizes.append(sum(part.numel() for part in torch.utils._pytree.tree_leaves(state)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("kind", KINDS[:6], ids=lambda kind: type(kind).__name__)
def test_a_key_that_repeats_for_a_thousand_tokens_does_not_blow_the_memory_up(kind: LayerKind) -> None:
    if isinstance(kind, LinearAttention):
        kind = MemoryLayer()
    assert isinstance(kind, MemoryLayer)
    torch.manual_seed(0)
    mixer = kind.build(32)
    assert isinstance(mixer, MemoryMixer)
    with torch.no_grad():
        if "rate" in mixer.starts:
            mixer.gates.bias[: mixer.num_heads] = 20.0  # the largest steps that the layer can take
        if "window" in mixer.starts:
            mixer.gates.bias[-len(mixer.starts["window"]) :] = 20.0  # of all pairs that a window has
        x = torch.randn(1, 1, 32).expand(1, 1000, 32)
        given = mixer._tokens(x, mixer.qkv(x), None, None)
        answers, state = mixer.memory(given)
    assert answers.isfinite().all()
    assert answers[:, :, -1].norm() < 10 * (given.v[:, :, -1].norm() + given.k[:, :, -1].norm())
    # Memora's state is logarithms, of which a softmax bounds what they are logarithms of.
    held = () if mixer.rule.map.kind == "kl" else state.weights
    assert max(float(part.abs().max()) for part in (*held, *mixer.memory._network().weights(state.weights))) < 10


def test_an_evaluation_with_the_memories_silenced_answers_otherwise() -> None:
    made, row = model(TitansLMM(chunk=4)), tokens()
    with torch.inference_mode():
        usual = made(batch_of(row)).logits
        memory = made.blocks[0].attention.memory
        plain = memory.forward
        memory.forward = lambda given, state=None: plain(
            Tokens(*given[:3], torch.zeros_like(given.rate), *given[4:]), state
        )
        silent = made(batch_of(row)).logits
    assert (usual - silent).abs().max() > 1e-6


def test_the_list_is_repeated_and_its_layers_are_those_of_the_configuration() -> None:
    titans = {"class_path": "TitansLMM", "init_args": {"chunk": 4, "depth": 1}}
    options = {"hidden_size": 16, "layers": ["DeltaNet", titans, "AttentionLayer"], "repeat": 2}
    made = build(
        checked(Component(class_path="MemoryTransformer", init_args=options), "architecture", "architecture"),
        "architecture", "architecture", {"spec": TEXT},
    )  # fmt: skip
    layers = [block.attention for block in made.blocks]
    assert [type(layer).__name__ for layer in layers] == ["MemoryMixer", "MemoryMixer", "RotaryAttention"] * 2
    assert layers[0].rule == layers[3].rule == DeltaNet().rule
    assert layers[1].rule == layers[4].rule == TitansLMM(chunk=4, depth=1).rule
    assert layers[0].qkv.weight is not layers[3].qkv.weight


def test_gates_of_a_rank_are_a_map_of_so_few_numbers_of_each_token() -> None:
    gates = {}
    for rank in (3, None):
        mixer = MemoryLayer(rule=Moneta().rule, projection=ProjectionOptions(gate_rank=rank)).build(16)
        with torch.no_grad():
            raw = mixer._gates(torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)))
        values = torch.cat(list(raw.values()), 1)[0] - mixer.gates.bias.unsqueeze(1)
        gates[rank] = int(torch.linalg.matrix_rank(values, rtol=1e-4))
    assert gates == {3: 3, None: 16}


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="MemoryTransformer.layers: must give at least one"):
        model()
    with pytest.raises(ValueError, match="MemoryTransformer.repeat: must give at least one layer, got 0"):
        model(DeltaNet(), repeat=0)
    with pytest.raises(ValueError, match="TitansLMM.num_heads: 5 does not divide hidden_size"):
        model(TitansLMM(num_heads=5))
    with pytest.raises(ValueError, match="^layers.1: TitansLMM.num_heads: 5 does not divide"):
        model(DeltaNet(), TitansLMM(num_heads=5))
    for kind in (TitansLMM, LaCT, SelfModifyingTitans, AttentionLayer, TitansMAC):
        for heads in (0, -2):
            with pytest.raises(ValueError, match=f"^{kind.__name__}.num_heads: must be at least 1, got {heads}"):
                kind(num_heads=heads)
    with pytest.raises(ValueError, match="^AttentionLayer.num_kv_heads: must be at least 1, got 0"):
        AttentionLayer(num_kv_heads=0)
    with pytest.raises(ValueError, match="^Atlas.degree: 5 of a head of 16 gives 1,118,480 features with rank None, "):
        Atlas(num_heads=1, degree=5, rank=None).build(16)
    with pytest.raises(ValueError, match="^Atlas.chunk: must be at least 1, got -4"):
        Atlas(chunk=-4)
    with pytest.raises(ValueError, match="^TitansLMM.max_rate: must be above 0, got -1"):
        TitansLMM(max_rate=-1.0)
    with pytest.raises(ValueError, match="^MemoryLayer.projection.max_rate: must lie above 0 .* at most at 2"):
        model(MemoryLayer(rule=MemoryRule(delta="single"), projection=ProjectionOptions(max_rate=3.0)))
    with pytest.raises(ValueError, match="AttentionLayer.num_heads: hidden_size .16. is no multiple"):
        model(AttentionLayer(num_heads=16))
    with pytest.raises(ValueError, match="projection.normaliser: needs learned_start: false"):
        ProjectionOptions(normaliser=True)
    with pytest.raises(ValueError, match="projection.decay_start: must lie between"):
        ProjectionOptions(decay_start=1.0)
    wrong = {"layers": [{"class_path": "TitansLMM", "init_args": {"chunks": 4}}]}
    with pytest.raises(ConfigError, match="layers.0: TitansLMM has no option 'chunks'; did you mean 'chunk'"):
        checked(Component(class_path="MemoryTransformer", init_args=wrong), "architecture", "architecture")


def test_the_record_is_told_what_computed_the_memories() -> None:
    made = model(DeltaNet(), AttentionLayer(), TitansLMM())
    assert made.facts() == {"memory_backend": "none yet"}
    made(batch_of(tokens()))
    assert made.facts() == {"memory_backend.0": "delta_memory torch", "memory_backend.2": "mlp_memory torch"}
    alike = model(DeltaNet(), GatedDeltaNet())
    alike(batch_of(tokens()))
    assert alike.facts() == {"memory_backend": "delta_memory torch"}


@every_kind
def test_under_autocast_operations_get_queries_keys_and_values_of_one_type(
    kind: LayerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's autocast norms in float32, and kernels refuse a mixture: the layer would fall back without a word."""
    seen: list[set[torch.dtype]] = []
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, *options, **named: norm(x.float(), *options, **named))

    def noted(self: Any, tokens: Tokens) -> str:
        seen.append({part.dtype for part in tokens[:3]})
        return "torch"

    for operation in (MatrixOperation, MLPOperation):
        monkeypatch.setattr(operation, "form", noted)
    with torch.autocast("cpu", torch.bfloat16):
        model(kind).float()(batch_of(tokens()))
    assert all(types == {torch.bfloat16} for types in seen)


@pytest.mark.parametrize(
    "kind",
    [
        TTTMLP(chunk=4),
        TitansLMM(chunk=4),
        TTTLinear(chunk=4),
        Moneta(chunk=4),
        Memora(chunk=4),
        LaCT(chunk=4),
        OmegaNet(chunk=4, window=7),
        Atlas(chunk=4, window=3),
        MemoryCaching(layer=TitansLMM(chunk=4), segment=4),
        TNT(layer=TitansLMM(chunk=4), global_chunk=8, local_chunks=[4], shard=8),
        TitansMAC(layer=TitansLMM(chunk=4), segment=8),
        TitansMAG(layer=TitansLMM(chunk=4), window=4, persistent=0),
        TitansMAL(layer=TitansLMM(chunk=4), window=16, persistent=0),
    ],
    ids=lambda k: type(k).__name__,
)
def test_flops_are_those_that_torch_counts_within_a_tenth(kind: LayerKind) -> None:
    torch.manual_seed(0)
    made = MemoryTransformer(spec=TEXT, hidden_size=64, layers=[kind], mlp_ratio=2.0)
    with FlopCounterMode(display=False) as counter:
        made(batch_of(tokens(rows=1)))
    assert made.flops_per_row() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_pages_example_and_all_variants_of_the_shipped_study_can_be_built() -> None:
    page = Path(__file__).parents[2] / "docs" / "memories.md"
    example = yaml.safe_load(page.read_text().split("```yaml")[1].split("```")[0])["architecture"]
    chosen = [
        Component(**example),
        *(run.architecture for run in expand(load_study("memories_text", [("seeds", "[0]")]))),
    ]
    assert len(chosen) == 9
    for component in chosen:
        made = build(checked(component, "architecture", "a"), "architecture", "a", {"spec": TEXT})
        assert made(batch_of(tokens())).logits.shape == (2, 16, 23)
        assert len(made.blocks) == 2 * (3 if made.embedding.embedding_dim == 256 else 1)


def test_a_run_writes_an_architectures_words_down_as_tags_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "facts", lambda self: {"memory_backend": "by hand"})
    folder = run_folder(tmp_path, study(training__budget={"steps": 1}))
    assert execute(folder).status == "FINISHED"
    told = [entry["values"] for entry in read(folder) if entry["kind"] == "tags"]
    assert told.count({"architecture.memory_backend": "by hand"}) == 1


@every_kind
def test_without_writes_no_answer_but_by_attention_and_convolution_reaches_back(kind: LayerKind) -> None:
    made, row = model(kind), tokens()
    usual = made(batch_of(row)).logits
    with made.without_writes():
        still = made(batch_of(row)).logits
        if isinstance(kind, MemoryLayer):  # its convolution sees three tokens before
            changed = row.clone()
            changed[:, 0] = (row[:, 0] + 1) % 23
            torch.testing.assert_close(made(batch_of(changed)).logits[:, 4:], still[:, 4:], rtol=0, atol=1e-14)
    assert still.isfinite().all()
    assert torch.equal(made(batch_of(row)).logits, usual)
    assert torch.equal(still, usual) == isinstance(kind, AttentionLayer)
