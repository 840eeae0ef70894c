"""Token levels that begin anew inside of slower ones: against a loop over tokens, in parts, packed; their limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from token_rows import assert_reads_in_parts, batch_of, tokens
from torch import Tensor

from clplat.architectures.associative_memory.layout import documents_of
from clplat.architectures.associative_memory.presets import TitansLMM
from clplat.architectures.continuum_memory.levels import TokenLevel
from clplat.architectures.continuum_memory.nested import NestedLevel
from clplat.architectures.continuum_memory.options import CMSLevel, ContinuumMemory
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=23)
SLOW, FAST = CMSLevel(clock="token", period=6, lr=0.1), CMSLevel(clock="token", period=2, lr=0.3)


def level(kind: type[TokenLevel] = NestedLevel, *, start_rate: float = 0.5) -> Any:
    """A level of period 2 in one of period 6."""
    torch.manual_seed(0)
    size = replace(CMSLevel(clock="token", period=2, lr=0.3, expand=1.0).sized(6), within="token6", context=6,
                   start_rate=start_rate)  # fmt: skip
    made = kind(size).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def inputs(rows: int = 2, length: int = 15) -> Tensor:
    return torch.randn(rows, length, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model(*levels: CMSLevel, carry: Any = "nested", **options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    memory = ContinuumMemory(levels=levels, carry=carry, **options)
    kinds = [AttentionLayer(num_heads=2), TitansLMM(num_heads=2, chunk=4)]
    return MemoryTransformer(spec=TEXT, hidden_size=16, layers=kinds, feed_forward=memory).double().eval()


def by_hand(made: NestedLevel, x_TC: Tensor) -> Tensor:
    """Token after token: answer; at every second token a step; at every sixth half of the way is kept."""

    def answer(weights: list[Tensor], key: Tensor) -> Tensor:
        gate, up, down = weights
        return (torch.nn.functional.silu(key @ gate) * (key @ up)) @ down

    start = [part[0] for part in made.fast.first]
    weights, gathered, answers = start, [torch.zeros_like(part) for part in start], []
    for t, key in enumerate(x_TC):
        answers.append(answer(weights, key))

        def loss(own: list[Tensor], key: Tensor = key) -> Tensor:
            return 0.5 * (answer(own, key) - made.target(key)).square().mean() / key.square().mean().clamp(min=1.0)

        gathered = [a + b for a, b in zip(gathered, torch.func.grad(loss)(weights), strict=True)]
        if (t + 1) % 2 == 0:
            weights = [w - 0.3 * g for w, g in zip(weights, gathered, strict=True)]
            gathered = [torch.zeros_like(weight) for weight in weights]
        if (t + 1) % 6 == 0:
            start = [(1 - made.start_rate) * a + made.start_rate * b for a, b in zip(start, weights, strict=True)]
            weights = start
    return torch.stack(answers)


@pytest.mark.parametrize("start_rate", [0.0, 0.5, 1.0])
def test_a_nested_level_is_the_loop_over_tokens_and_so_are_its_outer_gradients(start_rate: float) -> None:
    made, x = level(start_rate=start_rate), inputs()
    answers, wanted = made(x, None), torch.stack([by_hand(made, row) for row in x])
    torch.testing.assert_close(answers, wanted, rtol=0, atol=1e-12)
    parameters = [*made.fast.first, made.target.weight]
    ours, theirs = (torch.autograd.grad(one.square().sum(), parameters) for one in (answers, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)
        assert float(mine.abs().max()) > 1e-3


def test_what_a_fast_level_learned_is_undone_by_as_much_as_its_start_has_not_taken_over() -> None:
    x = inputs()
    whole, half, none = (level(start_rate=rate)(x, None) for rate in (1.0, 0.5, 0.0))
    torch.testing.assert_close(whole, level(TokenLevel)(x, None), rtol=0, atol=1e-13)  # nothing is: carry: sequential
    torch.testing.assert_close(none[:, 6:12], level()(x[:, 6:12], None), rtol=0, atol=1e-13)  # all: a row's beginning
    assert torch.equal(whole[:, :6], half[:, :6]) and torch.equal(half[:, :6], none[:, :6])
    assert bool(((half - whole)[:, 6:].abs().amax() > 1e-3) & ((half - none)[:, 6:].abs().amax() > 1e-3))


@pytest.mark.parametrize("parts", [[1] * 15, [6, 6, 3], [4, 1, 5, 2, 3], [13, 2]])
def test_a_row_may_be_split_anywhere(parts: list[int]) -> None:
    made, x = level(), inputs()
    state, answers = made.empty_state(2), []
    for part in x.split(parts, dim=1):
        answer, state = made.continued(part, state, None)
        answers.append(answer)
    torch.testing.assert_close(torch.cat(answers, 1), made(x, None), rtol=0, atol=1e-12)


def test_rows_that_stand_at_places_of_their_own_go_on_where_they_stopped() -> None:
    made, x = level(), inputs()
    for lengths in ([3, 7], [6, 2], [0, 8], [8, 6]):
        counts = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
        _, state = made.continued(x[:, :8], made.empty_state(2), counts)
        rest = torch.stack([x[row, length : length + 7] for row, length in enumerate(lengths)])
        answers, _ = made.continued(rest, state, None)
        for row, length in enumerate(lengths):
            alone = made(x[row : row + 1, : length + 7], None)
            torch.testing.assert_close(answers[row], alone[0, length:], rtol=0, atol=1e-12)


def test_a_packed_document_begins_with_the_trained_weights_and_a_new_slow_period() -> None:
    made, x = level(), inputs(rows=1)
    documents = documents_of(torch.tensor([[0] * 7 + [1] * 8]))
    answers = made(x, documents)
    torch.testing.assert_close(answers[:, 7:], made(x[:, 7:], None), rtol=0, atol=1e-12)
    torch.testing.assert_close(answers[:, :7], made(x[:, :7], None), rtol=0, atol=1e-12)
    assert bool((answers - made(x, None)).abs().max() > 1e-3)


def test_a_model_of_nested_levels_reads_in_parts_what_it_reads_at_once() -> None:
    made, row = model(CMSLevel(), SLOW, FAST, CMSLevel(clock="token", period=1, lr=0.2)), tokens()
    assert [type(one).__name__ for one in made.blocks[0].mlp.levels.values()] == [
        "StepLevel", "TokenLevel", "NestedLevel", "NestedLevel"
    ]  # fmt: skip
    assert_reads_in_parts(made, row, [4, 1, 1, 7, 3], atol=1e-11)
    sequential = model(CMSLevel(), SLOW, FAST, CMSLevel(clock="token", period=1, lr=0.2), carry="sequential")
    assert bool((sequential(batch_of(row)).logits - made(batch_of(row)).logits).abs().max() > 1e-9)


def test_the_model_says_which_level_is_nested_in_which_and_who_trains_their_beginnings() -> None:
    made = model(FAST, SLOW, CMSLevel(period=2), CMSLevel(period=8), start_rate=0.25)
    found = made.levels()
    assert {name: (one.within, one.start_rate) for name, one in found.items()} == {
        "step2": ("step8", 0.25), "step8": (None, 1.0),
    }  # fmt: skip
    starts = {name for name in found["step2"].parameters if ".fast.first." in name}
    own = dict(made.named_parameters())
    assert starts == {name for name in own if ".fast.first." in name and ".mlp." in name} and len(starts) == 12
    facts = made.facts()
    assert facts["level.token2"] == "2 tokens, local loss, in token6"
    assert facts["level.token6"] == "6 tokens, local loss, in step2"
    assert facts["level.step2"] == "2 training steps, the run's loss, in step8"


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        ([SLOW], {}, "ContinuumMemory.carry: nested needs two levels"),
        (
            [SLOW, CMSLevel(clock="token", period=4)],
            {},
            r"the period of token6 \(6\) must be a multiple of that of tok",
        ),
        ([CMSLevel(name="a"), CMSLevel(name="b")], {}, r"the period of a \(1\) must be a multiple of that of b \(1\)"),
        ([SLOW, FAST], {"start_rate": 1.5}, "ContinuumMemory.start_rate: must lie between 0 and 1, got 1.5"),
        ([SLOW, FAST], {"carry": "nest"}, "carry: must be one of sequential, nested, independent"),
    ],
)
def test_levels_that_do_not_nest_are_refused_by_name(levels: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuumMemory(**{"levels": levels, "carry": "nested", **options})
