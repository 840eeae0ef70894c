"""Residual networks: the shared contract, published sizes, the counted operations, and both shortcuts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from clplat.architectures.contract import CHECKS
from clplat.architectures.probing import Contract
from clplat.architectures.resnet import Block, ResNet18, ResNet32, SlimResNet18
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

SMALL = Spec(kind="classify", input_shape=(3, 6, 5), num_outputs=6, scenario="class")
CONTRACTS = {
    "resnet18": Contract(factory=lambda spec: ResNet18(spec=spec, width=4), spec=SMALL),
    "slim": Contract(factory=lambda spec: SlimResNet18(spec=spec, width=5), spec=SMALL),
    "resnet32": Contract(factory=lambda spec: ResNet32(spec=spec, width=4), spec=SMALL),
}


def spec(*shape: int, classes: int = 10) -> Spec:
    return Spec(kind="classify", input_shape=shape, num_outputs=classes)


def rows(count: int, *shape: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(inputs=torch.randn(count, *shape, generator=draw), targets=torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())
def test_architecture(contract: Contract, check: Callable[[Contract], None]) -> None:
    check(contract)


@pytest.mark.parametrize(
    ("kind", "classes", "parameters"),
    [(ResNet18, 10, 11_173_962), (SlimResNet18, 100, 1_109_240), (ResNet32, 10, 464_154)],
)
def test_parameters_are_those_of_the_literature(kind: type, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = kind(spec=spec(3, 32, 32, classes=classes))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 14)])
@pytest.mark.parametrize("kind", [ResNet18, SlimResNet18, ResNet32])
def test_operations_are_those_that_torch_counts(kind: type, shape: tuple[int, ...]) -> None:
    model = kind(spec=spec(*shape), width=4).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(rows(1, *shape))
    assert model.flops_per_row() == counter.get_total_flops()


def test_resnet18_costs_half_a_billion_multiplications_on_cifar() -> None:
    with torch.device("meta"):
        assert ResNet18(spec=spec(3, 32, 32)).flops_per_row() / 2 == pytest.approx(0.56e9, rel=0.01)


def test_the_number_of_weighted_layers_gives_each_network_its_name() -> None:
    def layers(model: torch.nn.Module) -> int:
        named = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
        return len([name for name in named if "project" not in name])

    assert layers(ResNet18(spec=SMALL, width=4)) == layers(SlimResNet18(spec=SMALL)) == 18
    assert layers(ResNet32(spec=SMALL)) == 32


def test_a_block_whose_convolutions_are_silent_is_its_shortcut() -> None:
    x = torch.rand(2, 3, 6, 6)
    same, padded, projected = (
        Block(3, 3, stride=1, shortcut="projection"), Block(3, 8, stride=2, shortcut="pad"),
        Block(3, 8, stride=2, shortcut="projection"),
    )  # fmt: skip
    for block in (same, padded, projected):
        torch.nn.init.zeros_(block.norm2.weight)
        block.eval()
    assert torch.equal(same(x), x)
    assert torch.equal(padded(x)[:, 2:5], x[:, :, ::2, ::2])
    assert not padded(x)[:, :2].any() and not padded(x)[:, 5:].any()
    assert sum(p.numel() for p in padded.parameters()) == 27 * 8 + 9 * 64 + 4 * 8
    conv, norm = projected.project
    torch.testing.assert_close(projected(x), F.relu(norm(conv(x))))


def test_hidden_is_the_mean_over_pixels_and_the_input_of_the_head() -> None:
    model = SlimResNet18(spec=SMALL).eval()
    output = model(rows(3, 3, 6, 5))
    assert output.hidden.shape == (3, 160)
    assert torch.equal(model.head(output.hidden), output.logits)


def test_rows_that_are_no_images_and_an_empty_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ResNet32 reads images \(C, H, W\); this stream's rows are \(12,\)"):
        ResNet32(spec=Spec(kind="language", input_shape=(12,), num_outputs=23))
    with pytest.raises(ValueError, match="width: must be at least 1"):
        ResNet18(spec=SMALL, width=0)
