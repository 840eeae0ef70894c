"""Scorers: sums and counts against numbers worked out by hand, shared over processes without loss or repetition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from caches import written

from clplat.streams.base import TensorData
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.generation_scorers import ExactMatch, Together, write_answers
from clplat.streams.scorers import Classify, Likelihood
from clplat.streams.tokenizers import ByteTokenizer
from clplat.streams.tokens import Document, TokenCache, TokenData


class Model:
    """Answers from a table: `table` (C or V,) logits for everything, `answers` by prompt."""

    def __init__(self, table: list[float], answers: dict[str, str] | None = None) -> None:
        self.table, self.answers, self.asked = torch.tensor(table), answers or {}, []

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.table.expand(*batch.targets.shape, -1)

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None) -> list[list[int]]:
        texts = [bytes(prompt).decode() for prompt in prompts]
        self.asked += texts
        return [list(self.answers.get(text, "").encode())[:max_new_tokens] for text in texts]

    def device(self) -> torch.device:
        return torch.device("cpu")


def value(sums: dict[str, torch.Tensor], name: str) -> float:
    return float(sums[name][0] / sums[name][1])


def test_short_prompts_are_written_as_many_together_as_have_the_tokens_of_a_batch() -> None:
    sizes: list[int] = []

    class Echo(Model):
        def generate(self, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None) -> list[list[int]]:
            sizes.append(len(prompts))
            return prompts

    lengths = [40, 2, 1, 3, 2, 41, 4, 90]
    prompts = [[number] * length for number, length in enumerate(lengths)]
    # 100 tokens: five prompts of at most 4 + 16, but two of more than that as well.
    answers = write_answers(Echo([]), prompts, max_new_tokens=16, stop=None, batch_size=2, tokens_per_row=50)
    assert answers == prompts and sizes == [5, 2, 1]


def test_classification_counts_right_answers_and_mean_nats() -> None:
    data = TensorData(torch.zeros(4, 1), torch.tensor([0, 1, 1, 1]), task=0)
    sums = Classify().score(Model([0.0, 2.0]), data, torch.arange(4), batch_size=3)
    assert value(sums, "accuracy") == 0.75
    expected = F.cross_entropy(torch.tensor([[0.0, 2.0]]).expand(4, 2), data.targets)
    assert value(sums, "loss") == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("ignored", [0, 9], ids=["mostly targets", "few targets"])
def test_likelihood_counts_nats_by_token_and_bits_by_byte_and_skips_what_is_ignored(ignored: int) -> None:
    table = [0.0, 1.0, 2.0]
    nats = -F.log_softmax(torch.tensor(table), dim=0)
    targets = F.pad(torch.tensor([[0, 1, IGNORE, 2]]), (ignored, 0), value=IGNORE)
    answer = F.pad(torch.tensor([[False, False, True, True]]), (ignored, 0))
    batch = Batch(inputs=targets, targets=targets, answer=answer)
    scorer = Likelihood(token_bytes=torch.tensor([3.0, 1.0, 0.0]), answers=True)
    sums = scorer.batch_sums(Model(table), batch)
    assert value(sums, "loss") == pytest.approx(float(nats.sum()) / 3)
    assert value(sums, "bits_per_byte") == pytest.approx(float(nats.sum()) / math.log(2) / 4)
    assert value(sums, "answer_loss") == pytest.approx(float(nats[2]))


def test_a_set_without_answer_marks_is_refused_where_answers_are_scored() -> None:
    batch = Batch(inputs=torch.zeros(1, 2, dtype=torch.long), targets=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="answer"):
        Likelihood(token_bytes=torch.ones(1), answers=True).batch_sums(Model([0.0]), batch)


QUESTIONS = {f"{n} + 1? ": f"so #### {n + 1}" for n in range(10)}


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    documents = [Document(text="no question here"), *(Document(prompt=q, text=a) for q, a in QUESTIONS.items())]
    return written(tmp_path / "c", documents)


def exact(cache: TokenCache, marker: str = "####", prompt: int = 99, new: int = 99, examples: int = 99) -> ExactMatch:
    return ExactMatch(
        cache=cache, tokenizer=ByteTokenizer(), marker=marker, max_prompt_tokens=prompt, max_new_tokens=new,
        max_examples=examples,
    )  # fmt: skip


def score(scorer: ExactMatch, model: Model, cache: TokenCache, rank: int = 0, size: int = 1) -> list[float]:
    data = TokenData(cache, length=40, task=0)
    return scorer.score(model, data, torch.arange(len(data))[rank::size], 3)["exact_match"].tolist()


def test_exact_match_compares_what_follows_the_last_marker(cache: TokenCache) -> None:
    answers = dict(QUESTIONS)
    answers["0 + 1? "] = "#### 7 no, wait #### 1 "
    answers["1 + 1? "] = "2"
    answers["2 + 1? "] = "#### 3.5"
    assert score(exact(cache), Model([], answers), cache) == [8, 10]
    assert score(exact(cache, marker=""), Model([], answers), cache) == [7, 10]


def test_an_answer_cut_before_its_end_is_wrong(cache: TokenCache) -> None:
    assert score(exact(cache, new=9), Model([], dict(QUESTIONS)), cache) == [9, 10]


def test_only_the_first_questions_are_asked_and_long_prompts_keep_their_end(cache: TokenCache) -> None:
    model = Model([])
    assert score(exact(cache, prompt=4, examples=2), model, cache) == [0, 2]
    assert model.asked == [" 1? ", " 1? "]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_questions_without_repetition(cache: TokenCache, size: int) -> None:
    models = [Model([], dict(QUESTIONS)) for _ in range(size)]
    parts = [score(exact(cache), model, cache, rank, size) for rank, model in enumerate(models)]
    assert [sum(column) for column in zip(*parts, strict=True)] == [10, 10]
    assert sorted(sum((model.asked for model in models), [])) == sorted(QUESTIONS)
    assert all(model.asked for model in models)


def test_several_scorers_stand_side_by_side_on_one_set(cache: TokenCache) -> None:
    both = Together(Likelihood(token_bytes=ByteTokenizer().token_bytes()), exact(cache))
    data = TokenData(cache, length=40, task=0)
    sums = both.score(Model([0.0] * 257, dict(QUESTIONS)), data, torch.arange(len(data)), 2)
    assert sums.keys() == both.metrics.keys() == {"loss", "bits_per_byte", "exact_match"}
    assert value(sums, "loss") == pytest.approx(math.log(257), abs=1e-6)
    assert not both.metrics["loss"].higher_is_better and both.metrics["exact_match"].higher_is_better
