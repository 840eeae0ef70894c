"""Label likelihood: equal to reading each label behind each prompt by itself, among the classes seen alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clplat.streams.base import TensorData
from clplat.streams.batch import Batch
from clplat.streams.label_scorer import LabelLikelihood
from clplat.streams.labelled_rows import TokenRows, answered, padded

VOCABULARY, END = 11, 10
LABELS = [[3, END], [3, 4, END], [5, 6, 7, END], [8, END], [1, 2, END]]
PROMPTS = [[1, 2, 3], [4], [9, 9, 9, 9, 9, 1], [2, 2], [5, 0, 5], [7, 8, 7, 8], [6]]
RIGHT = [0, 1, 2, 3, 4, 2, 1]


class Model:
    """A causal language: the logits at a place follow from all tokens up to there, in their order."""

    def __init__(self, seen: list[int] | None = None) -> None:
        self.seen, self.rows = seen or [], []
        self.table = torch.randn(97, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def logits(self, batch: Batch) -> torch.Tensor:
        self.rows.append(len(batch))
        state, found = torch.zeros(len(batch), dtype=torch.long), []
        for tokens in batch.inputs.T:
            state = (31 * state + tokens + 1) % 97
            found.append(self.table[state])
        return torch.stack(found, dim=1)

    def classes_seen(self) -> list[int]:
        return self.seen

    def device(self) -> torch.device:
        return torch.device("cpu")


def rows(right: list[int] = RIGHT) -> TokenRows:
    words = padded([label[:-1] for label in LABELS], 4, END)
    inputs, targets = answered(padded(PROMPTS, 6, END), words[torch.tensor(right)], END)
    return TokenRows(inputs, targets, task=0)


def alone(prompt: list[int], label: list[int]) -> list[float]:
    """Log-probabilities of a label's tokens, one by one, with nothing else in the batch."""
    found = []
    for place in range(len(label)):
        tokens = torch.tensor([prompt + label[:place]])
        logits = Model().logits(Batch(inputs=tokens, targets=tokens))
        found.append(float(logits[0, -1].float().log_softmax(-1)[label[place]]))
    return found


def scorer(**options: Any) -> LabelLikelihood:
    return LabelLikelihood(labels=LABELS, **options)


@pytest.mark.parametrize("measure", ["sum", "mean"])
def test_a_label_is_as_likely_as_its_tokens_read_alone_behind_the_prompt(measure: Any) -> None:
    pairs = torch.cartesian_prod(torch.arange(len(PROMPTS)), torch.tensor([4, 0, 2, 3, 1]))
    batch = rows().batch(torch.arange(len(PROMPTS)))
    found = scorer(measure=measure).likelihoods(Model(), batch, *pairs.T)
    for (row, label), value in zip(pairs.tolist(), found.tolist(), strict=True):
        nats = alone(PROMPTS[row], LABELS[label])
        assert value == pytest.approx(sum(nats) / (len(nats) if measure == "mean" else 1), abs=1e-5)


def score(model: Model, data: TokenRows, order: torch.Tensor, size: int = 3, **options: Any) -> dict[str, list[float]]:
    return {name: pair.tolist() for name, pair in scorer(**options).score(model, data, order, size).items()}


def likeliest(allowed: list[int], measure: str = "sum") -> list[int]:
    def measured(prompt: list[int], label: list[int]) -> float:
        return sum(alone(prompt, label)) / (len(label) if measure == "mean" else 1)

    return [max(allowed, key=lambda label: measured(prompt, LABELS[label])) for prompt in PROMPTS]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("measure", ["sum", "mean"])
@pytest.mark.parametrize("seen", [[0, 1, 2, 3, 4], [1, 3], [2]])
def test_the_answer_is_the_likeliest_of_the_classes_seen(seen: list[int], measure: str, size: int) -> None:
    best = likeliest(seen, measure)
    assert score(Model(seen), rows(best), torch.arange(7), size, measure=measure)["accuracy"] == [7, 7]
    found = score(Model(seen), rows(), torch.arange(7), size, measure=measure)["accuracy"]
    assert found == [sum(a == b for a, b in zip(best, RIGHT, strict=True)), 7]


@pytest.mark.parametrize("measure", ["sum", "mean"])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_what_is_not_read_is_not_the_likeliest(measure: Any, sharpness: float) -> None:
    """Many labels begin alike, one is a single token, and models choose hardly or surely."""
    draw = torch.Generator().manual_seed(1)
    words = sorted({tuple(torch.randint(5, (n,), generator=draw).tolist()) for n in (1, 2, 3, 4) for _ in range(20)})
    labels = [[*word, END] for word in words] + [[9]]
    made, everything = LabelLikelihood(labels=labels, measure=measure), list(range(len(labels)))
    model = Model(everything)
    model.table *= sharpness
    prompts, spelled = padded(PROMPTS, 6, END), padded([list(word) for word in words], 4, END)

    def answered_by(right: torch.Tensor) -> TokenRows:
        return TokenRows(*answered(prompts, spelled[right], END), task=0)

    pairs = torch.cartesian_prod(torch.arange(7), torch.tensor(everything))
    batch = answered_by(torch.zeros(7, dtype=torch.long)).batch(torch.arange(7))
    chances = made.likelihoods(model, batch, *pairs.T).view(7, -1)
    model.rows.clear()
    best, last = chances[:, :-1].argmax(1), chances.argmax(1) == len(labels) - 1
    found = made.score(model, answered_by(best), torch.arange(7), 5)["accuracy"]
    assert found.tolist() == [7 - int(last.sum()), 7]
    assert sharpness < 4 or sum(model.rows) < 7 * len(labels) / 2


def test_a_class_that_was_not_seen_is_never_the_answer() -> None:
    assert len(set(likeliest([0, 1, 2, 3, 4]))) > 1
    for hidden in range(len(LABELS)):
        seen = [label for label in range(len(LABELS)) if label != hidden]
        assert score(Model(seen), rows([hidden] * 7), torch.arange(7))["accuracy"] == [0, 7]


def test_a_tasks_own_candidates_stand_above_what_was_seen() -> None:
    own = [0, 4]
    found = score(Model([1, 2, 3]), rows(likeliest(own)), torch.arange(7), candidates=own)
    assert found["accuracy"] == [7, 7]


def test_where_no_class_was_seen_nothing_is_counted() -> None:
    assert score(Model([]), rows(), torch.arange(7)) == {"accuracy": [0, 0], "answer_loss": [0, 0]}


def test_the_answer_loss_is_in_nats_a_token_of_the_right_label_and_its_end() -> None:
    nats = [-sum(alone(prompt, LABELS[label])) for prompt, label in zip(PROMPTS, RIGHT, strict=True)]
    total, count = score(Model([0]), rows(), torch.arange(7))["answer_loss"]
    assert total == pytest.approx(sum(nats), abs=1e-4) and count == sum(len(LABELS[label]) for label in RIGHT)


def test_scores_depend_neither_on_the_order_of_rows_nor_on_batches_nor_on_the_processes_that_share_them() -> None:
    whole = score(Model([0, 1, 2, 3, 4]), rows(), torch.arange(7))
    turned = score(Model([0, 1, 2, 3, 4]), rows(), torch.arange(7).flip(0), size=2)
    halves = [score(Model([0, 1, 2, 3, 4]), rows(), torch.arange(7)[rank::2]) for rank in range(2)]
    for name, pair in whole.items():
        assert turned[name] == pytest.approx(pair, abs=1e-4)
        assert [a + b for a, b in zip(*(half[name] for half in halves))] == pytest.approx(pair, abs=1e-4)


def test_no_forward_has_more_rows_than_it_may() -> None:
    model = Model([0, 1, 2, 3, 4])
    score(model, rows(), torch.arange(7), size=3)
    assert max(model.rows) == 3 and 2 * 7 <= sum(model.rows) <= 7 * (len(LABELS) + 1)


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: .*no two"):
        LabelLikelihood(labels=[[1, END], [1, END]])


def test_an_answer_that_is_no_label_is_refused() -> None:
    data = TensorData(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[-100, 9, END, -100]]), task=0)
    with pytest.raises(ValueError, match="an answer that is no label"):
        scorer().score(Model([0]), data, torch.arange(1), 1)


def test_labels_of_one_token_are_read_off_at_once() -> None:
    labels = [[3], [8], [1]]
    inputs = padded([prompt[:5] for prompt in PROMPTS], 6, END)
    targets = torch.full_like(inputs, -100)
    for number, prompt in enumerate(PROMPTS):
        targets[number, min(5, len(prompt)) - 1] = labels[number % 3][0]
    model, data = Model(), TokenRows(inputs, targets, task=0)
    found = LabelLikelihood(labels=labels, candidates=[2, 0, 1]).score(model, data, torch.arange(7), 7)
    assert len(model.rows) == 1
    best = [max(range(3), key=lambda label: alone(prompt[:5], labels[label])[0]) for prompt in PROMPTS]
    assert found["accuracy"].tolist() == [sum(label == number % 3 for number, label in enumerate(best)), 7]
