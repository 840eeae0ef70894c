"""What of a layer's memories is named where a loss is not a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clplat.architectures.associative_memory.mixer import MemoryMixer
from clplat.architectures.associative_memory.presets import LayerKind, TitansLMM
from clplat.architectures.hope.presets import SelfModifyingTitans
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.errors import NotFiniteError
from clplat.loss_means import LossMeans
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

SPEC = Spec(kind="language", input_shape=(12,), num_outputs=23)


def model(kind: LayerKind | None = None) -> MemoryTransformer:
    torch.manual_seed(0)
    layers = [kind or TitansLMM(num_heads=4, chunk=4)]
    return MemoryTransformer(spec=SPEC, hidden_size=16, layers=layers, repeat=3)


def step(made: MemoryTransformer) -> None:
    rows = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(1))
    made(Batch(inputs=rows, targets=rows)).logits.square().mean().backward()


class _BurstsGoingBack(torch.autograd.Function):
    """Leaves answers (B, H, T, E) as they are, and makes the gradient of head 2 infinite."""

    @staticmethod
    def forward(ctx: Any, answers: Tensor) -> Tensor:
        return answers.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        slope = slopes[0].clone()
        slope[:, 2] = torch.inf
        return slope


def bursting(mixer: MemoryMixer) -> None:
    plain = mixer._remembered

    def remembered(*given: Any) -> tuple[Tensor, tuple[Any, ...]]:
        answers, after = plain(*given)
        return _BurstsGoingBack.apply(answers), after

    mixer._remembered = remembered  # type: ignore[method-assign]


def test_of_finite_passes_nothing_is_told() -> None:
    made = model()
    assert made.not_finite() is None
    step(made)
    assert made.not_finite() is None


@pytest.mark.parametrize(
    "kind",
    [TitansLMM(num_heads=4, chunk=4), SelfModifyingTitans(num_heads=4, chunk=4, generator_chunk=4)],
    ids=["titans", "hope"],
)
def test_a_memory_that_overflows_is_named_with_its_layer_and_head_and_not_those_that_it_spoils(kind: LayerKind) -> None:
    made = model(kind)
    step(made)
    with torch.no_grad():
        for part in made.blocks[1].attention.memory.first:  # of Hope five memories' heads, side by side
            part[3::4] *= 1e30
    step(made)
    step(made)
    assert made.not_finite() == (
        "layer 1.attention, head 3: the memory's answers became infinite or NaN in training pass 2, before all else"
    )


def test_a_memory_that_makes_a_gradient_infinite_is_named_although_all_it_answers_is_finite() -> None:
    made = model()
    bursting(made.blocks[1].attention)
    step(made)
    found = made.not_finite()
    assert found is not None and found.startswith(
        "layer 1.attention, head 2: the gradient that leaves the memory's queries, keys and values became"
    )


def test_no_memory_is_blamed_for_what_was_not_finite_before_it_or_above_it() -> None:
    below, above = model(), model()
    with torch.no_grad():
        below.embedding.weight[:] = torch.nan
        above.blocks[2].mlp.down.weight[:] = torch.nan
    for made in (below, above):
        step(made)
        assert made.not_finite() is None


def test_nothing_is_noted_in_evaluation() -> None:
    made = model().eval()
    with torch.no_grad():
        made.blocks[1].attention.memory.first[0][:] = torch.nan
    step(made)
    assert made.not_finite() is None


def test_a_loss_that_is_not_a_number_says_what_the_model_knows_of_it() -> None:
    means = LossMeans(["loss"], torch.tensor([torch.nan]), 40)
    with pytest.raises(NotFiniteError, match=r"loss: became nan by step 40 \(layer 1, head 3: it burst\)\. What was"):
        means.read(lambda: "layer 1, head 3: it burst")
