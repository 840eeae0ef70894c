"""Levels that learn the next token while a text is scored: against a loop by hand, causal, and without a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from studies import assert_same, study
from torch import Tensor

from clplat.architectures.continuum_memory.options import CMSLevel, ContinuumMemory
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.assembly import Parts, assemble
from clplat.errors import ConfigError
from clplat.evaluation import View
from clplat.hooks import Hooks
from clplat.objective import Objective
from clplat.reading import RowReader, check_learning
from clplat.strategies.base import Strategy
from clplat.strategies.world import World
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.scorers import Likelihood, NextToken, columns
from clplat.study_file import expand, load_study

TEXT = Spec(kind="language", input_shape=(13,), num_outputs=11)


class Watched(View):
    """A view that shows the reader that it gave away last."""

    reader: RowReader

    @contextmanager
    def reading(self, rows: int) -> Iterator[RowReader]:  # type: ignore[override]
        with super().reading(rows) as self.reader:
            yield self.reader


class Listening(Likelihood):
    """A scorer that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__(token_bytes=torch.ones(11, dtype=torch.long))
        self.heard: list[Tensor] = []

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        assert not logits.requires_grad
        self.heard.append(logits)
        return super().sums(logits, batch)


def read_by(*levels: CMSLevel, **options: Any) -> Watched:
    torch.manual_seed(0)
    model = MemoryTransformer(
        spec=TEXT, hidden_size=8, layers=[AttentionLayer(num_heads=2)] * 2, initial_std=0.3,
        feed_forward=ContinuumMemory(levels=levels, **options),
    )  # fmt: skip
    return Watched(model.double().eval(), Objective(TEXT, []), Hooks({}), [], "64-true")


def level(**options: Any) -> CMSLevel:
    return CMSLevel(**{"clock": "token", "loss": "next_token", "period": 4, "lr": 0.02, **options})


def text(rows: int = 3, length: int = 13, **fields: Tensor) -> Batch:
    tokens = torch.randint(11, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    none = torch.zeros(rows, dtype=torch.long)
    return Batch(inputs=tokens[:, :-1].clone(), targets=tokens[:, 1:].clone(), task=none, **fields)


@torch.no_grad()
def answers(view: Watched, batch: Batch) -> Tensor:
    """The logits of all tokens, as they are scored."""
    listening = Listening()
    NextToken(listening).batch_sums(view, batch)
    return torch.cat(listening.heard, 1)


def by_hand(view: Watched, row: Batch, rates: dict[str, tuple[int, float]]) -> tuple[Tensor, MemoryTransformer]:
    """One row, read by a copy of the model whose levels (period and rate by name) take steps of plain descent."""
    model, heard, length = copy.deepcopy(view.architecture), [], row.inputs.shape[1]
    gathered: dict[str, Tensor] = {}
    own = {n: p for n, p in model.named_parameters() if any(f".levels.{level}." in n for level in rates)}
    for t in range(0, length, 2):
        stop = min(t + 2, length)
        logits = model(columns(row, 0, stop)).logits[:, t:]
        heard.append(logits.detach())
        targets = row.targets[:, t:stop].flatten()
        nats = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum", ignore_index=IGNORE)
        for name, gradient in zip(own, torch.autograd.grad(nats, list(own.values())), strict=True):
            gathered[name] = gathered.get(name, 0) + gradient
        for name, (period, rate) in rates.items():
            if stop % period == 0 and stop < length:
                for key in [key for key in own if f".levels.{name}." in key]:
                    own[key].data -= rate * gathered.pop(key)
    return torch.cat(heard, 1), model


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_is_answered_as_by_a_model_of_its_own_that_takes_a_step_whenever_a_period_has_been_scored(
    packed: bool,
) -> None:
    view = read_by(CMSLevel(), level(), level(period=6, lr=0.06, reduction="mean"))
    batch = text(segment_ids=torch.tensor([[0] * 5 + [1] * 8] * 3) if packed else None)
    batch.targets[1, 3:6] = IGNORE
    found = answers(view, batch)
    for row in range(3):
        wanted, model = by_hand(view, batch.rows(slice(row, row + 1)), {"token4": (4, 0.02), "token6": (6, 0.01)})
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=0, atol=1e-12)
        weights = dict(model.named_parameters())
        assert len(view.reader.weights) == 8
        for name, own in view.reader.weights.items():
            torch.testing.assert_close(own[row], weights[name], rtol=0, atol=1e-12)
            assert bool((own[row] - dict(view.architecture.named_parameters())[name]).abs().max() > 1e-4)


def test_no_token_is_answered_by_what_was_learned_from_itself_or_from_later_ones() -> None:
    view, batch = read_by(level(lr=1.0)), text()
    before = answers(view, batch)
    for t in (2, 7, 12):
        changed = batch.replaced(inputs=batch.inputs.clone(), targets=batch.targets.clone())
        changed.targets[:, t] = (changed.targets[:, t] + 1) % 11  # the token behind place t
        changed.inputs[:, t + 1 :] = (changed.inputs[:, t + 1 :] + 1) % 11
        after = answers(view, changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        if t < 12:
            assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_rows_do_not_learn_from_each_other_and_nothing_stays_learned() -> None:
    view, batch = read_by(level(lr=1.0)), text()
    weights = copy.deepcopy(view.architecture.state_dict())
    together = answers(view, batch)
    alone = torch.cat([answers(view, batch.rows(slice(row, row + 1))) for row in (2, 1, 0)])
    torch.testing.assert_close(together, alone.flip(0), rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), view.architecture.state_dict().values()))
    with torch.no_grad():
        plain = view.logits(batch)
    torch.testing.assert_close(plain[:, :4], together[:, :4], rtol=0, atol=1e-12)
    assert bool((plain - together)[:, 4:].abs().max() > 1e-3)


def test_a_text_that_repeats_itself_is_foretold_better_the_more_of_it_was_learned() -> None:
    tokens = torch.tensor([3, 7, 1, 9]).repeat(16).expand(2, -1)
    batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], task=torch.zeros(2, dtype=torch.long))
    nats = F.cross_entropy(answers(read_by(level(lr=0.1)), batch).mT, batch.targets, reduction="none")
    with torch.no_grad():
        resting = F.cross_entropy(read_by(level(lr=0.1)).logits(batch).mT, batch.targets, reduction="none")
    # Whoever knows which four tokens there are, and nothing of their order, has ln 4.
    assert bool(nats[:, 48:].mean() < math.log(4)) and bool(resting[:, 48:].mean() > 2 * math.log(4))


STREAM = {"class_path": "StdlibText", "init_args": {"block_size": 16, "max_train_tokens": 2000, "max_eval_tokens": 64,
                                                  "max_answers": 1}}  # fmt: skip


def parts(levels: list[dict[str, Any]], **changes: Any) -> Parts:
    memory = {"class_path": "ContinuumMemory", "init_args": {"levels": levels}}
    attention = {"class_path": "AttentionLayer", "init_args": {"num_heads": 2}}
    layers = {"hidden_size": 16, "layers": [attention], "feed_forward": memory}
    data = study(stream=STREAM, architecture={"class_path": "MemoryTransformer", "init_args": layers})
    return assemble(expand(load_study(data | changes))[0], World())


def test_an_evaluation_lets_levels_learn_where_likelihoods_are_scored_and_leaves_the_model_as_it_was() -> None:
    learning = {"period": 4, "clock": "token", "loss": "next_token"}
    off = {"off": {"class_path": "MemoryOff"}}
    found = {
        name: parts([{"period": 1}, learning | {"lr": lr}], strategies=off) for name, lr in (("on", 0.1), ("off", 0.0))
    }
    weights = copy.deepcopy(found["on"].architecture.state_dict())
    table = {name: one.evaluator.cells([0]) for name, one in found.items()}
    again = found["on"].evaluator.cells([0])
    assert_same([cell.value for cell in again], [cell.value for cell in table["on"]])
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), found["on"].architecture.state_dict().values()))
    losses = {
        name: {(cell.view, cell.task): cell.value for cell in cells if cell.metric == "loss"}
        for name, cells in table.items()
    }
    assert len(losses["on"]) == 6 and losses["on"].keys() == losses["off"].keys()
    for place, value in losses["on"].items():
        if place[0] == "memory_off":  # levels that are kept from learning are the model as it stands
            assert value == losses["off"][place]
        else:  # 256 kinds of bytes and a model that knows nothing: to learn which there are is to gain much
            assert value != losses["off"][place]
    assert found["on"].architecture.facts()["level.token4"] == "4 tokens, the next token's loss while scored"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stream": {"class_path": "MQAR", "init_args": {"pairs": [2], "lengths": [12], "vocab_size": 16,
                        "train_rows": 8, "val_rows": 8, "test_rows": 8, "multiples": []}}},
            "architecture: a level with loss: next_token learns while the likelihood of a text is scored, and task",
        ),
    ],
)  # fmt: skip
def test_where_nothing_would_teach_a_level_the_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts([{"clock": "token", "loss": "next_token", "period": 4}], **changes)


class Answering(Strategy):
    """A strategy that answers in the model's place."""

    def predict(self, batch: Batch) -> Tensor:
        return batch.inputs


def test_a_strategy_that_answers_in_the_models_place_is_refused() -> None:
    view = read_by(level())
    with pytest.raises(ConfigError, match=r"a strategy \(Answering\) answers in its place; use loss: local"):
        check_learning(view.architecture, Hooks({"own": Answering()}), [])
    check_learning(read_by(CMSLevel()).architecture, Hooks({"own": Answering()}), [])


def test_levels_that_cannot_learn_the_next_token_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="levels.step[0-9]+.loss: is for clock: token"):
        CMSLevel(loss="next_token")
    with pytest.raises(ValueError, match="levels.[a-z]+[0-9]+.loss: must be one of local, next_token, got 'next'"):
        CMSLevel(clock="token", loss="next")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="carry: nested levels begin anew inside of the model, where token4 learns"):
        ContinuumMemory(levels=[CMSLevel(), level()], carry="nested")
