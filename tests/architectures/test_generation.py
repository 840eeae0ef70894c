"""Greedy continuation: batched as one by one, cached as by full passes, ended by the stop token."""

from __future__ import annotations

import pytest
import torch

from clplat.architectures.base import Architecture, Output
from clplat.architectures.generation import greedy
from clplat.architectures.mlp import MLP
from clplat.architectures.transformer import Transformer
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=29)
PROMPTS = [[3], [5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 4, 5, 6]]


class WithoutDecode(Architecture):
    """A Transformer that can only make full passes."""

    causal = True

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch, state=None, return_hidden=None):
        return self.inner(batch)


class Counting(Architecture):
    """Answers token + 1, and counts how often it is asked."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.anchor, self.passes = torch.nn.Parameter(torch.zeros(1)), 0

    def forward(self, batch, state=None, return_hidden=None):
        self.passes += 1
        return Output(logits=torch.nn.functional.one_hot((batch.inputs + 1) % 29, 29).float())


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(2)
    model = Transformer(spec=TEXT, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2)
    for parameter in model.parameters():  # large enough for answers that vary
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model.double().eval()


def test_batched_prompts_of_unequal_length_answer_as_one_by_one(model: Transformer) -> None:
    together = greedy(model, PROMPTS, max_new_tokens=9, stop=None)
    assert together == [greedy(model, [prompt], max_new_tokens=9, stop=None)[0] for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) > 2
    assert all(len(answer) == 9 for answer in together)


def test_cached_decoding_answers_as_full_passes(model: Transformer) -> None:
    full = greedy(WithoutDecode(model), PROMPTS, max_new_tokens=9, stop=None)
    assert greedy(model, PROMPTS, max_new_tokens=9, stop=None) == full


def test_an_answer_ends_before_the_first_stop_token(model: Transformer) -> None:
    whole = greedy(model, PROMPTS, max_new_tokens=9, stop=None)
    stop = whole[1][4]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in whole]
    assert greedy(model, PROMPTS, max_new_tokens=9, stop=stop) == expected


def test_generation_ends_once_all_rows_have_stopped() -> None:
    model = Counting()
    assert greedy(model, [[1], [3, 4]], max_new_tokens=20, stop=6) == [[2, 3, 4, 5], [5]]
    assert model.passes == 5


def test_no_prompts_and_no_new_tokens_give_empty_answers(model: Transformer) -> None:
    assert greedy(model, [], max_new_tokens=3, stop=None) == []
    assert greedy(model, PROMPTS, max_new_tokens=0, stop=1) == [[], [], [], []]


def test_an_empty_prompt_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        greedy(model, [[1], []], max_new_tokens=3, stop=None)


def test_a_model_that_is_not_causal_is_refused() -> None:
    images = MLP(spec=Spec(kind="classify", input_shape=(4,), num_outputs=2))
    with pytest.raises(ValueError, match="MLP: is not causal"):
        greedy(images, [[1]], max_new_tokens=3, stop=None)
