"""Adapters, peft's and ours: nothing at the start, trained alone, kept apart, saved without the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import END, VOCABULARY, model_folder

from clplat.architectures.adapted import Adapted
from clplat.architectures.adapters import AdapterHost, backbone_checksum
from clplat.architectures.base import Adapters, Architecture
from clplat.architectures.contract import CHECKS
from clplat.architectures.lora import LoRA, insert
from clplat.architectures.mamba import Mamba
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.probing import Contract, saved
from clplat.architectures.transformer import Transformer
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

SPEC = Spec(kind="language", input_shape=(12,), num_outputs=VOCABULARY, end_token=END)
WIDE = LoRA(rank=32, alpha=64, dropout=0.1, targets=["attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"])


def transformer(spec: Spec) -> Architecture:
    return Transformer(spec=spec, hidden_size=32, num_layers=2, num_heads=4, initial_std=0.3, tie_head=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(params=["peft", "ours"])
def host(request: pytest.FixtureRequest, folder: Path) -> AdapterHost:
    torch.manual_seed(0)
    if request.param == "ours":
        return Adapted(spec=SPEC, model=transformer, lora=LoRA(rank=4, dropout=0.0))
    return Pretrained(spec=SPEC, name=str(folder), lora=LoRA(rank=4, dropout=0.0))


def batch() -> Batch:
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    return Batch(inputs=tokens, targets=tokens)


def logits(model: Architecture) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()).logits


def train(model: Architecture, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch()).logits.flatten(0, 1), batch().targets.flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_model_of_ours_with_adapters_holds_the_contract(check: Any) -> None:
    check(
        Contract(
            factory=lambda spec: Adapted(spec=spec, model=transformer, lora=WIDE),
            spec=SPEC,
            gradient_steps=3,
            overfit_steps=300,
            learning_rate=2e-2,
        )
    )


def test_a_new_adapter_changes_no_bit_and_training_changes_no_bit_of_the_backbone(host: AdapterHost) -> None:
    assert isinstance(host, Adapters) and host.adapter_names() == ["default"]
    with host.answering():
        alone = logits(host)
    assert torch.equal(logits(host), alone)
    before = {name: tensor.clone() for name, tensor in host.adapter_parameters("default").items()}
    train(host)
    assert backbone_checksum(host.backbone) == host.checksum
    assert all(not torch.equal(tensor, before[name]) for name, tensor in host.adapter_parameters("default").items())
    assert not torch.equal(logits(host), alone)
    with host.answering():
        assert torch.equal(logits(host), alone)


def test_the_state_holds_adapters_and_the_checksum_alone_and_goes_on_after_loading(host: AdapterHost) -> None:
    host.add_adapter("slow")
    host.use_adapters(["default", "slow"], ["slow"])
    train(host)
    state = saved(host.state_dict())
    assert sum(tensor.numel() for tensor in state.values()) == 32 + 2 * sum(
        p.numel() for p in host.adapter_parameters("slow").values()
    )
    torch.manual_seed(5)
    again: AdapterHost
    if isinstance(host, Pretrained):
        again = Pretrained(spec=SPEC, name=host.source.name, lora=host.lora)
    else:
        torch.manual_seed(0)
        again = Adapted(spec=SPEC, model=transformer, lora=host.lora)
    again.restructure(saved(dict(host.structure())))
    again.load_state_dict(state)
    assert (again.active, again.trained) == (("default", "slow"), ("slow",))
    assert torch.equal(logits(again), logits(host))
    del state[next(name for name in state if "lora_B" in name)]
    with pytest.raises(RuntimeError, match="Missing key.*lora_B"):
        again.load_state_dict(state)


def test_adapters_of_another_backbone_are_refused(folder: Path, tmp_path: Path) -> None:
    first = Pretrained(spec=SPEC, name=str(folder), lora=LoRA())
    changed = Pretrained(spec=SPEC, name=str(model_folder(tmp_path, "llama", initializer_range=0.2)), lora=LoRA())
    with pytest.raises(ValueError, match=f"another backbone .{first.checksum[:16]}, and this one is"):
        changed.load_state_dict(first.state_dict())


def test_gradients_reach_the_trained_adapter_although_another_one_answered_last(host: AdapterHost) -> None:
    host.add_adapter("slow")
    answer = host(batch()).logits
    with host.answering("slow"), torch.no_grad():
        host(batch())
    answer.square().mean().backward()
    train(host)
    assert all(p.grad is not None for p in host.adapter_parameters("default").values())
    assert all(p.grad is None and not p.requires_grad for p in host.adapter_parameters("slow").values())
    assert {name for name, p in host.named_parameters() if not p.requires_grad} == set(host.frozen)


def test_changes_of_active_adapters_add_up(host: AdapterHost) -> None:
    with host.answering():
        alone = logits(host.double())
    layer = next(iter(host._layers().values()))
    x = torch.randn(2, 32, dtype=torch.float64)
    host.add_adapter("second")
    host.double()
    with torch.no_grad():
        for adapter in host.adapter_names():
            for tensor in host.adapter_parameters(adapter).values():
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(len(adapter)))
    parts = {}
    for active in ([], ["default"], ["second"], ["default", "second"]):
        with host.answering(*active), torch.no_grad():
            parts["+".join(active)] = layer(x)
    one, two = (parts[name] - parts[""] for name in ("default", "second"))
    torch.testing.assert_close(parts["default+second"] - parts[""], one + two, rtol=1e-10, atol=1e-12)
    assert one.any() and two.any() and alone.isfinite().all()


def test_our_layer_and_the_one_of_peft_give_the_same_answers_and_gradients(folder: Path) -> None:
    options = LoRA(rank=4, alpha=6, dropout=0.0, targets=["q_proj", "down_proj"])
    theirs = Pretrained(spec=SPEC, name=str(folder), lora=options)
    plain = Pretrained(spec=SPEC, name=str(folder))
    insert(plain.backbone, "default", options, options.targets or [])
    ours = plain._layers()
    for layer in ours.values():
        layer.set_adapter(["default"])
    mine = {f"{path}.{part}": getattr(layer, part)["default"].weight for path, layer in ours.items()
            for part in ("lora_A", "lora_B")}  # fmt: skip
    named = theirs.adapter_parameters("default")
    assert named.keys() == mine.keys()
    with torch.no_grad():
        for name, tensor in named.items():
            mine[name].copy_(tensor.normal_(std=0.1))
    for model in (theirs, plain):
        model.eval()(batch()).logits.square().mean().backward()
    torch.testing.assert_close(logits(theirs), logits(plain))
    torch.testing.assert_close({n: p.grad for n, p in named.items()}, {n: p.grad for n, p in mine.items()})


def test_a_backbone_is_read_from_the_snapshot_of_the_run_that_trained_it(tmp_path: Path) -> None:
    trained = transformer(SPEC)
    torch.save({"structure": {}, "architecture": trained.state_dict()}, tmp_path / "weights.pt")
    host = Adapted(spec=SPEC, model=transformer, weights=str(tmp_path / "weights.pt"))
    assert torch.equal(logits(host), logits(trained))
    with pytest.raises(FileNotFoundError, match="weights: there is no file"):
        Adapted(spec=SPEC, model=transformer, weights="nowhere.pt")
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="weights: .*other.pt is no checkpoint"):
        Adapted(spec=SPEC, model=transformer, weights=str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (transformer, ["q_proj"], "no layer of Transformer is called 'q_proj'; its linear layers are down, gate_up"),
        (
            lambda spec: MoETransformer(spec=spec, hidden_size=32, num_layers=1),
            ["mlp.down"],
            "no layer of MoETransformer",
        ),
        (
            lambda spec: Mamba(spec=spec, hidden_size=32, num_layers=1),
            None,
            "no layer of Mamba is called 'attention.qkv'",
        ),
    ],
)
def test_targets_that_name_no_linear_layer_are_refused(model: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapted(spec=SPEC, model=model, lora=LoRA(targets=targets))


def test_a_layer_whose_weights_are_read_without_calling_it_is_refused() -> None:
    class Tied(Transformer):
        def _head(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(hidden, self.own_head.weight)

    with pytest.raises(ValueError, match="Tied reads the weights of own_head without calling the layer"):
        Adapted(
            spec=SPEC,
            model=lambda spec: Tied(spec=spec, hidden_size=32, num_layers=1, tie_head=False),
            lora=LoRA(targets=["own_head"]),
        )


def test_wrong_names_and_options_of_adapters_are_refused(host: AdapterHost) -> None:
    with pytest.raises(ValueError, match="'default': is there already"):
        host.add_adapter("default")
    with pytest.raises(ValueError, match="there is none of that name; there are .'default'."):
        host.use_adapters(["fast"])
    with pytest.raises(ValueError, match="trained, but not active"):
        host.add_adapter("slow")
        host.use_adapters(["default"], ["slow"])
    with pytest.raises(ValueError, match="lora.rank: must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="lora.targets: name at least one"):
        LoRA(targets=[])
