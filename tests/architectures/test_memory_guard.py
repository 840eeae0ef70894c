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
        "layer 1.attention, head 3: the memory's answers became infinite or NaN in training pass 2, before all else; "
        "a memory that grows by itself needs a lower max_rate, or smaller chunks"
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


def largest_answer(kind: TitansLMM, momentum: float, *, scale: float, tokens: int = 512) -> float:
    """The longest answer to one key that is stepped on with the largest steps, at values 7 long, of a memory whose
    first weights are `scale` times those that keep the scale of what they read."""
    torch.manual_seed(0)
    mixer = kind.build(4 * 32)
    memory, chunk = mixer.memory, kind.rule.chunk
    with torch.no_grad():
        for part in memory.first:
            torch.nn.init.normal_(part, std=scale / part.shape[1] ** 0.5)
        x = torch.zeros(1, tokens, 128)
        prepared = mixer._tokens(x, mixer.qkv(x), None, None)
        k, v = torch.randn(1, 4, 1, 32).expand(1, 4, tokens, 32), torch.randn(1, 4, tokens, 32)
        v = mixer._bounded(7 * v / v.norm(dim=-1, keepdim=True))
        momenta = torch.full((1, 4, tokens), momentum)
        given = prepared._replace(
            q=k, k=k, v=v, rate=mixer.max_rate * (1 - momenta), log_momentum=momenta.log(),
            log_decay=tuple(torch.full_like(gate, 0.999).log() for gate in prepared.log_decay),
        )  # fmt: skip
        assert chunk == 16
        return float(memory(given)[0].norm(dim=-1).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("momentum", [0.01, 0.97])
def test_titans_stay_of_the_size_of_their_values_at_the_largest_steps_though_first_weights_have_grown(
    depth: int, momentum: float, residual: bool
) -> None:
    assert largest_answer(TitansLMM(num_heads=4, depth=depth, residual=residual), momentum, scale=1.5) < 4


def test_steps_that_suit_a_matrix_make_two_layers_overflow_once_their_first_weights_have_grown() -> None:
    loose = TitansLMM(num_heads=4, residual=True, short_values=False)
    assert loose.build(128).max_rate == 1 / 16
    assert largest_answer(loose, 0.01, scale=1.5) == torch.inf


@pytest.mark.parametrize(("depth", "residual", "steep"), [(1, True, 1), (2, True, 4), (4, True, 2**3.5), (2, False, 2)])
def test_steps_go_down_with_the_steepness_of_the_layers_product(depth: int, residual: bool, steep: float) -> None:
    kind = TitansLMM(num_heads=4, depth=depth, residual=residual)
    assert kind.rule.steepness == pytest.approx(steep if depth > 1 or not residual else 1)
    assert kind.build(128).max_rate == pytest.approx(1 / (16 * steep))
    assert TitansLMM(num_heads=4, depth=depth, max_rate=0.5).build(128).max_rate == 0.5


def test_long_values_are_shortened_and_short_ones_are_left() -> None:
    mixer = TitansLMM(num_heads=4).build(16)
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    bounded = mixer._bounded(v)
    torch.testing.assert_close(bounded, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    bounded.sum().backward()
    assert v.grad is not None and v.grad.isfinite().all()
    assert torch.equal(TitansLMM(num_heads=4, short_values=False).build(16)._bounded(v), v)
