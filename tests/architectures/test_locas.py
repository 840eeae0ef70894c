"""Side memories: nothing at the start, trained alone, taken away or joined without a trace, refused where they cannot
stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import END, VOCABULARY, model_folder

from clplat.architectures.adapters import backbone_checksum
from clplat.architectures.base import Adapters, Architecture, SideMemories, WritesMemory
from clplat.architectures.contract import CHECKS
from clplat.architectures.generation import greedy
from clplat.architectures.locas import LocasModel, dense, export
from clplat.architectures.locas.feed_forward import view_of
from clplat.architectures.locas.memory import Bank
from clplat.architectures.locas.options import SideMemory
from clplat.architectures.lora import LoRA
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.probing import Contract
from clplat.architectures.transformer import Transformer
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch

SPEC = Spec(kind="language", input_shape=(12,), num_outputs=VOCABULARY, end_token=END)
KINDS = ("llama", "gpt2", "ours")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {kind: model_folder(parent, kind) for kind in ("llama", "gpt2", "mixtral", "phi3", "mamba")}


def backbone(folders: dict[str, Path], kind: str, **options: Any) -> Any:
    def made(spec: Spec) -> Architecture:
        torch.manual_seed(0)
        if kind == "ours":
            return Transformer(spec=spec, hidden_size=32, num_layers=2, num_heads=4, initial_std=0.3, tie_head=False)
        return Pretrained(spec=spec, name=str(folders[kind]), **options)

    return made


def host(folders: dict[str, Path], kind: str = "llama", **options: Any) -> LocasModel:
    torch.manual_seed(1)
    return LocasModel(spec=SPEC, model=backbone(folders, kind), memory=SideMemory(**{"rank": 4} | options))


def batch(seed: int = 1) -> Batch:
    tokens = torch.randint(3, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(seed))
    return Batch(inputs=tokens[:, :-1].clone(), targets=tokens[:, 1:].clone())


def begun(model: LocasModel) -> LocasModel:
    model.begin_memory("default", batch(), torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def logits(model: Architecture) -> torch.Tensor:
    return model.eval()(batch()).logits


def train(model: LocasModel, steps: int = 3, rate: float = 1e-2) -> LocasModel:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()).logits.flatten(0, 1), batch().targets.flatten()).backward()
        optimizer.step()
        model.step_end(None)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_contract(folders: dict[str, Path], kind: str, check: Any) -> None:
    options = SideMemory(rank=96, scale="one", clip=False, start="gaussian")
    check(
        Contract(
            factory=lambda spec: LocasModel(spec=spec, model=backbone(folders, kind), memory=options), spec=SPEC,
            gradient_steps=3, overfit_steps=300,
        )
    )  # fmt: skip


@pytest.mark.parametrize("start", ["clone", "bottom", "random_clone", "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_that_was_begun_changes_no_bit_of_an_answer(
    folders: dict[str, Path], kind: str, start: str
) -> None:  # fmt: skip
    expected = logits(backbone(folders, kind)(SPEC))
    model = host(folders, kind, start=start)
    assert torch.equal(logits(model), expected) and torch.equal(logits(begun(model)), expected)
    keys = [tensor for name, tensor in model.adapter_parameters("default").items() if name.endswith("K")]
    torch.testing.assert_close(torch.stack([k.norm(dim=1) for k in keys]), torch.ones(2, 4))


def test_cloned_rows_are_the_most_active_ones_of_the_layer_on_counted_tokens(folders: dict[str, Path]) -> None:
    model, rows = host(folders, rank=5).double().eval(), batch()
    rows.targets[:, :4] = IGNORE
    heard: dict[str, torch.Tensor] = {}
    for path, side in model.sideways().items():
        side.register_forward_hook(lambda _, given, __, path=path: heard.update({path: given[0]}))
    model.begin_memory("default", rows, torch.Generator())
    for path, side in model.sideways().items():
        layer: Any = side.base_ffn
        a = heard[path][:, 4:].flatten(0, 1)
        active = (F.silu(a @ layer.gate_proj.weight.T) * (a @ layer.up_proj.weight.T)).abs().mean(0)
        chosen = active.sort(descending=True).indices[:5]
        bank = side.bank("default")
        torch.testing.assert_close(bank.K.data, F.normalize(layer.up_proj.weight[chosen], dim=1))
        torch.testing.assert_close(bank.G.data, F.normalize(layer.gate_proj.weight[chosen], dim=1))
        assert not bank.V.any()


def test_which_rows_are_cloned_follows_the_option(folders: dict[str, Path]) -> None:
    found = {}
    for start in ("clone", "bottom", "random_clone"):
        model = begun(host(folders, rank=48, start=start))
        found[start] = next(iter(model.sideways().values())).bank("default").K.detach()
    torch.testing.assert_close(found["clone"], found["bottom"].flip(0))
    assert not torch.equal(found["random_clone"], found["clone"])
    torch.testing.assert_close(found["random_clone"].sort(0).values, found["clone"].sort(0).values)


@pytest.mark.parametrize("scale", ["adaptive", "one", "one_over_rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_memory_adds_is_its_equation(folders: dict[str, Path], kind: str, scale: str) -> None:
    model = host(folders, kind, scale=scale).double()
    side = next(iter(model.sideways().values()))
    bank, view = side.bank("default"), side.view()
    a = torch.randn(7, 32, dtype=torch.float64)
    with torch.no_grad():
        bank.V.normal_()
        norms = view.values().norm(dim=1).mean().item()
        factor = {"adaptive": norms / 4, "one": 1.0, "one_over_rank": 0.25}[scale]
        keyed = a @ bank.K.T
        active = view.activation(keyed) if bank.G is None else F.silu(a @ bank.G.T) * keyed
        expected = side.base_ffn(a) + factor * active @ bank.V
        torch.testing.assert_close(side(a), expected, rtol=1e-6, atol=1e-9)


def test_no_row_is_longer_than_one_after_a_step(folders: dict[str, Path]) -> None:
    model = train(begun(host(folders)), steps=1, rate=3.0)
    norms = torch.cat([p.detach().norm(dim=1) for p in model.adapter_parameters("default").values()])
    assert float(norms.max()) <= 1 + 1e-6 and float(norms.max()) > 0.99
    free = train(begun(host(folders, clip=False)), steps=1, rate=3.0)
    assert max(float(p.detach().norm(dim=1).max()) for p in free.adapter_parameters("default").values()) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_memory_alone_and_taking_it_away_gives_the_model_back(
    folders: dict[str, Path], kind: str
) -> None:
    model = host(folders, kind)
    base, before = logits(model), model.checksum
    train(begun(model))
    assert backbone_checksum(model.backbone) == before == backbone_checksum(backbone(folders, kind)(SPEC))
    assert float((logits(model) - base).abs().max()) > 1e-3
    assert isinstance(model, SideMemories) and isinstance(model, Adapters) and isinstance(model, WritesMemory)
    for off in (model.answering, model.without_writes):
        with off():
            assert torch.equal(logits(model), base)
    assert all("side_banks" in name or name == "backbone_sha256" for name in model.state_dict())
    again = host(folders, kind)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_a_memory_of_another_backbone_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = {"llama": model_folder(tmp_path, "llama", initializer_range=0.2)}
    with pytest.raises(ValueError, match="trained beside another backbone"):
        host(other).load_state_dict(host(folders).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_joined_to_the_layers_it_answers_the_same(folders: dict[str, Path], kind: str) -> None:
    model = train(begun(host(folders, kind)))
    model.make_permanent("default")
    model.add_adapter("second")
    model.use_adapters(["second"])
    model.begin_memory("second", batch(2), torch.Generator())
    train(model)
    with model.answering():
        assert not torch.equal(logits(model), logits(backbone(folders, kind)(SPEC)))
    for precision, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model.to(precision)
        joined = dense(model)
        widths = [len(view.keys()) for module in joined.modules() if (view := view_of(module)) is not None]
        assert widths == [len(side.view().keys()) + 8 for side in model.sideways().values()]
        assert float((logits(joined) - logits(model)).abs().max()) <= bound
        assert not any("side_banks" in name for name in joined.state_dict())


def test_memories_of_unequal_rank_are_filled_up_with_rows_that_add_nothing(folders: dict[str, Path]) -> None:
    model = train(begun(host(folders))).double()
    side = next(iter(model.sideways().values()))
    small = Bank(2, 32, gated=True, scale=0.3, like=side.bank("default").K)
    torch.nn.init.normal_(small.V)
    side.side_banks["default"] = small
    joined: Any = dense(model)
    assert {layer.mlp.down_proj.in_features for layer in joined.backbone.model.layers} == {48 + 4}
    assert float((logits(joined) - logits(model)).abs().max()) <= 1e-12


def test_the_exported_folder_is_a_plain_model_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "gpt2"):
        model = train(begun(host(folders, kind)))
        loaded = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / kind))
        assert type(loaded) is type(model.backbone.backbone)
        with torch.no_grad():
            assert float((loaded(batch().inputs).logits - logits(model)).abs().max()) <= 1e-5
    with pytest.raises(ValueError, match="Transformer is no model of transformers"):
        export(host(folders, "ours"), tmp_path / "ours")


def test_a_model_with_a_memory_continues_texts_as_the_joined_one_does(folders: dict[str, Path]) -> None:
    model = train(begun(host(folders))).double().eval()
    prompts = [[5, 9, 30], [7], [11, 12, 13, 14]]
    assert greedy(model, prompts, max_new_tokens=6, stop=END) == greedy(
        dense(model).eval(), prompts, max_new_tokens=6, stop=END
    )


def test_memories_stack_and_are_rebuilt_from_their_structure(folders: dict[str, Path]) -> None:
    model = train(begun(host(folders)))
    model.make_permanent("default")
    for name in ("one", "two"):
        model.add_adapter(name)
    model.use_adapters(["one", "two"], ["two"])
    before = {name: p.detach().clone() for name, p in model.adapter_parameters("one").items()}
    train(model)
    assert all(torch.equal(before[name], p) for name, p in model.adapter_parameters("one").items())
    again = host(folders)
    again.restructure(model.structure())
    again.load_state_dict(model.state_dict())
    assert again.structure() == model.structure() and again.frozen == model.frozen
    assert torch.equal(logits(again), logits(model))
    assert again.adapter_names() == ["one", "two"]
    with pytest.raises(ValueError, match="'default'.*none of that name"):
        again.use_adapters(["default"])


def test_a_memory_dropped_leaves_the_backbone_to_the_last_bit_and_comes_back(folders: dict[str, Path]) -> None:
    model, bare = train(begun(host(folders))), logits(backbone(folders, "llama")(SPEC))
    learned = logits(model)
    model.use_adapters([])
    assert torch.equal(logits(model), bare) and not torch.equal(learned, bare)
    model.use_adapters(["default"])
    assert torch.equal(logits(model), learned)


def refused(folders: dict[str, Path], case: str) -> LocasModel:
    made: dict[str, Any] = {
        "experts": lambda: host(folders, "mixtral"),
        "our experts": lambda: LocasModel(spec=SPEC, model=lambda spec: MoETransformer(
            spec=spec, hidden_size=32, num_layers=1, num_heads=4)),
        "fused": lambda: host(folders, "phi3"),
        "no layers": lambda: LocasModel(spec=SPEC, model=backbone(folders, "mamba", attention="eager")),
        "lora": lambda: LocasModel(spec=SPEC, model=backbone(folders, "llama", lora=LoRA())),
        "gates": lambda: host(folders, start="gradient"),
        "rank": lambda: host(folders, rank=0),
        "rows": lambda: host(folders, rank=49),
        "columns": lambda: host(folders, "gpt2", rank=33, start="gradient", compression="nl_svd"),
        "start": lambda: host(folders, start="top"),
        "idle": lambda: host(folders, compression="nl_svd"),
        "share": lambda: host(folders, write_share=0.0),
    }  # fmt: skip
    return made[case]()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("experts", "has experts .*not supported; choose a model with one feed-forward layer a block"),
        ("our experts", "MoETransformer has experts"),
        ("fused", "holds gates and keys in one matrix .*gate_up_proj.*choose a model that keeps"),
        ("no layers", "no feed-forward layer that is known.*Llama, Mistral, Qwen"),
        ("lora", "Pretrained has low-rank adapters; leave out its lora"),
        ("gates", "memory.start: gradient writes into layers without a gate"),
        ("rank", "memory.rank: must be at least 1, got 0"),
        ("rows", "memory.rank: 49 slots cannot be cloned from a layer of 48 rows; give 48 at most, or start: gaussian"),
        ("columns", "memory.rank: nl_svd gives a layer of size 32 no 33 slots; give 32 at most, or compression: prune"),
        ("start", "memory.start: must be one of clone, .*got 'top'"),
        ("idle", "memory.compression: is about the slots that start: gradient writes.*start: clone .*leave it out"),
        ("share", r"memory.write_share: must lie in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folders: dict[str, Path], case: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        refused(folders, case)
