"""Runs that read: every chunk is scored before it is learned, from what came before it alone, and resumed exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from small_models import model_folder
from studies import DIGITS, run_folder

from clplat.api import load_model
from clplat.architectures.adapters import backbone_checksum
from clplat.assembly import assemble
from clplat.config import load_run
from clplat.errors import ConfigError
from clplat.evaluation import Evaluator, View
from clplat.execution import execute
from clplat.journal import read, table
from clplat.strategies.world import World
from clplat.streams.base import EvalSet
from clplat.streams.scorers import Scorer, Sums
from clplat.unchanged import Unchanged

BYTES = 257
TEXT = "the cat sat on the mat and the dog sat on the log. " * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), "llama", vocab_size=BYTES, eos_token_id=BYTES - 1)


def pretrained(model: Path, **options: Any) -> dict[str, Any]:
    return {"class_path": "Pretrained", "init_args": {"name": str(model), **options}}


def locas(model: Path, **memory: Any) -> dict[str, Any]:
    return {"class_path": "LocasModel", "init_args": {"model": pretrained(model), "memory": {"rank": 4} | memory}}


def variants(model: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Architecture and strategies, by name."""
    lora = pretrained(model, lora={"rank": 4, "dropout": 0.1})
    kinds = {
        after: (locas(model), {"locas": {"class_path": "Locas", "init_args": {"after_task": after}}})
        for after in ("keep_one", "stack", "permanentize", "fresh")
    }
    return kinds | {
        "random": (locas(model, start="random_clone"), kinds["stack"][1]),
        "temp_lora": (lora, {"temp_lora": {"class_path": "TempLoRA"}}),
        "fresh_lora": (lora, {"temp_lora": {"class_path": "TempLoRA", "init_args": {"fresh": "task"}}}),
        "truncation": (pretrained(model), {"truncation": {"class_path": "Truncation"}}),
    }


def run_of(model: Path, folder: Path, variant: str, text: str = TEXT, **options: Any) -> dict[str, Any]:
    """A book of eight chunks in parts of two, unless told otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "book.txt").write_text(text[:129])
    architecture, strategies = variants(model)[variant]
    book = {"name": "book", "file": str(folder / "book.txt")}
    stream = {"books": [book], "chunk": 16, "window": 32, "passes": 2, "parts": 4, "cache_dir": str(folder / "cache")}
    return {
        "name": "reading",
        "stream": {"class_path": "BookStream", "init_args": stream | options},
        "architecture": architecture,
        "strategies": {"prequential": {"class_path": "Prequential"}} | strategies,
        "training": {
            "budget": {"epochs": 1}, "batch_size": 1, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}}
        },
        "checkpoint": DIGITS["checkpoint"], "tracking": DIGITS["tracking"],
    }  # fmt: skip


def measured(folder: Path) -> dict[str, float]:
    """The last value of every number that strategies and model tell of themselves."""
    found: dict[str, float] = {}
    for entry in read(folder):
        if entry["kind"] == "metric":
            found |= {name: v for name, v in entry["values"].items() if name.startswith(("strategy/", "model/"))}
    return found


def done(data: dict[str, Any], folder: Path, name: str = "run") -> Path:
    run = run_folder(folder, data, name)
    outcome = execute(run)
    assert outcome.status == "FINISHED", outcome
    return run


@pytest.mark.parametrize("variant", ["keep_one", "stack", "permanentize", "random", "fresh_lora"])
def test_a_reader_stopped_in_the_middle_of_a_book_goes_on_as_if_it_had_not_been(
    model: Path, tmp_path: Path, variant: str
) -> None:
    assert_resumes_as_if_never_stopped(run_of(model, tmp_path, variant), step=9, folder=tmp_path)
    whole, stopped = (measured(next((tmp_path / kind).rglob("config.yaml")).parent) for kind in ("whole", "stopped"))
    assert whole == stopped and "strategy/prequential/ppl/book_4" in whole


@pytest.mark.parametrize("variant", ["keep_one", "temp_lora"])
def test_a_chunk_is_scored_before_it_is_learned_and_by_what_came_before_it_alone(
    model: Path, tmp_path: Path, variant: str
) -> None:
    one_each: dict[str, Any] = {"parts": 8, "passes": 3}
    frozen = measured(done(run_of(model, tmp_path, "truncation", **one_each), tmp_path, "frozen"))
    run = done(run_of(model, tmp_path, variant, **one_each), tmp_path, "reader")
    changed = TEXT[:100] + "xyz, quite another text stands here behind it"
    other = measured(done(run_of(model, tmp_path / "changed", variant, changed, **one_each), tmp_path, "other"))
    found = measured(run)
    names = [f"strategy/prequential/ppl/book_{part}" for part in range(1, 9)]
    assert found[names[0]] == frozen[names[0]], "nothing has been read before the first chunk"
    assert all(found[name] != frozen[name] for name in names[1:])
    assert [found[name] == other[name] for name in names] == [True] * 6 + [False] * 2
    scores = table(run).scores()
    for part, name in enumerate(names):
        # What the result table has of a part before it is read, in an evaluation of its own.
        assert math.exp(-scores[part][part]) == pytest.approx(found[name], rel=1e-5)


def test_perplexity_is_that_of_all_tokens_and_the_mean_over_chunks_stands_beside_it(
    model: Path, tmp_path: Path
) -> None:  # fmt: skip
    run = done(run_of(model, tmp_path, "truncation", parts=8), tmp_path)
    found, parts = measured(run), -table(run).scores()[0]
    assert found["strategy/prequential/loss"] == pytest.approx(parts.mean(), rel=1e-6)
    assert found["strategy/prequential/ppl"] == pytest.approx(math.exp(parts.mean()), rel=1e-5)
    assert found["strategy/prequential/ppl_chunk_mean"] == pytest.approx(sum(map(math.exp, parts)) / 8, rel=1e-5)
    assert found["strategy/prequential/ppl_chunk_mean"] > found["strategy/prequential/ppl"]


@pytest.mark.parametrize(("variant", "rounds"), [("truncation", 1), ("temp_lora", 5)])
def test_the_frozen_arm_learns_nothing_and_scores_each_set_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, rounds: int
) -> None:
    scored: list[int] = []
    measure = Evaluator._scores

    def counted(self: Evaluator, test: EvalSet, *rest: Any) -> Any:
        scored.append(len(test.data))
        return measure(self, test, *rest)

    monkeypatch.setattr(Evaluator, "_scores", counted)
    scores = table(done(run_of(model, tmp_path, variant), tmp_path)).scores()
    assert (scores == scores[0]).all() == (rounds == 1) and scores.shape == (5, 4)
    assert len(scored) == 4 * rounds, "before reading, and behind each of four parts"
    monkeypatch.setattr(Unchanged, "check", lambda self, model: self._found.clear())
    again = table(done(run_of(model, tmp_path, variant), tmp_path, "again")).scores()
    assert (again == scores).all() and len(scored) == 4 * (rounds + 5), "scored anew they are the same, bit for bit"


def test_a_frozen_arm_is_scored_again_when_its_weights_have_changed_or_a_set_asks_what_was_seen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = assemble(load_run(run_folder(tmp_path, run_of(model, tmp_path, "truncation")) / "config.yaml"), World())
    evaluator, before = parts.evaluator, [cell.value for cell in parts.evaluator.cells([])]
    with torch.no_grad():
        parts.architecture.backbone.model.norm.weight.mul_(1.5)
    changed = [cell.value for cell in evaluator.cells([0])]
    assert all(one != other for one, other in zip(before, changed, strict=True))
    scorer = parts.stream.tasks[1].test.scorer
    monkeypatch.setattr(type(scorer), "score", lambda self, view, *_: {
        name: torch.tensor([1.0 + len(view.tasks_seen()), 1.0]) for name in self.metrics
    })  # fmt: skip
    evaluator._unchanged._found.clear()
    assert [{cell.value for cell in evaluator.cells(seen)} for seen in ([], [0], [0, 1])] == [{1.0}, {2.0}, {3.0}]
    written: list[bool] = []

    def answers(self: Scorer, view: View, *_: Any) -> Sums:
        written.append(not view.waits_for(1))
        return {name: torch.tensor([float(written[-1]), 1.0]) for name in self.metrics}

    monkeypatch.setattr(type(scorer), "score", answers)
    evaluator._unchanged._found.clear()
    turns = [[], [0], [0, 1], [0, 1, 2]]
    assert [{cell.value for cell in evaluator.cells(seen)} for seen in turns] == [{1.0}, {0.0}, {1.0}, {1.0}]
    assert written == 4 * [True] + 4 * [False], "before training and when its turn has come it is asked the same"


@pytest.mark.parametrize(("after", "memories"), [("keep_one", 1), ("stack", 4), ("permanentize", 4), ("fresh", 1)])
def test_what_becomes_of_a_memory_behind_a_task(model: Path, tmp_path: Path, after: str, memories: int) -> None:
    run = done(run_of(model, tmp_path, after), tmp_path)
    read_model = load_model(run)
    assert backbone_checksum(read_model.backbone) == read_model.checksum
    names = read_model.structure()
    assert len(names["memories"]) + len(names["permanent"]) == memories
    assert measured(run)["model/memory_parameters"] == memories * 3 * 2 * 32 * 4
    rows = [p.detach() for side in read_model.sideways().values() for p in side.side_banks.parameters()]
    assert max(float(p.norm(dim=1).max()) for p in rows) <= 1 + 1e-6
    if after == "stack":
        assert names["trained"] == ["memory3"] and all(bank.any() for bank in rows)
    if after == "permanentize":
        assert names["active"] == [] and len(names["permanent"]) == 4


def test_a_fresh_memory_begins_every_task_from_the_frozen_model(model: Path, tmp_path: Path) -> None:
    from clplat.strategies.locas import Locas

    found = []

    class Watched(Locas):
        def task_start(self, task: Any) -> None:
            super().task_start(task)
            found.append(any(bool(b.V.any()) for b in self.context.architecture._banks(["default"])))

    run = run_folder(tmp_path, run_of(model, tmp_path, "fresh"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clplat.strategies.locas.Locas", Watched)
        execute(run)
    assert found == [False] * 4 and measured(run)["model/memory_value_norm"] > 0


def wrong(model: Path, folder: Path, case: str) -> dict[str, Any]:
    variant = {"no memories": "temp_lora", "no adapter": "truncation", "no lora": "keep_one"}.get(case, "keep_one")
    data = run_of(model, folder, variant)
    first = data["strategies"]["prequential"]
    data["strategies"] |= {
        "no memories": {"temp_lora": {"class_path": "Locas"}}, "no lora": {"locas": {"class_path": "TempLoRA"}},
        "no adapter": {"truncation": {"class_path": "TempLoRA"}},
        "truncated": {"truncation": {"class_path": "Truncation"}},
        "twice": {"own": {"class_path": "AdapterPerTask"}},
        "after": {"locas": {"class_path": "Locas", "init_args": {"after_task": "drop"}}},
    }.get(case, {})  # fmt: skip
    if case in ("unbegun", "random slots", "frozen"):
        data["strategies"] = {"prequential": first} | {
            "unbegun": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 4}}},
            "frozen": {"truncation": {"class_path": "Truncation"}},
        }.get(case, {})
    if case == "random slots":
        data["architecture"] = locas(model, start="gaussian")
    if case == "second":
        data["strategies"] = {"locas": data["strategies"]["locas"], "prequential": first}
    if case == "batches":
        data["training"]["batch_size"] = 2
    if case == "order":
        data["stream"] = DIGITS["stream"]
        data["architecture"], data["strategies"] = DIGITS["architecture"], {"prequential": first}
    if case == "context":
        data["stream"]["init_args"]["window"] = 64
    return data


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("second", "strategies.prequential: Prequential: must be the first of the strategies"),
        ("batches", "strategies.prequential: .*set batch_size: 1"),
        ("order", "strategies.prequential: .*rows that come in their order"),
        ("no memories", "Locas: Pretrained has no side memories; put it into LocasModel"),
        ("no adapter", "TempLoRA: Pretrained has no adapter"),
        ("no lora", "TempLoRA: the adapters of LocasModel are not low-rank ones"),
        ("after", "after_task"),
        ("context", "do not fit the context"),
        ("unbegun", "strategies: none of them begins the memories of LocasModel.*add Locas, or set memory.start: gau"),
        ("truncated", r"Truncation trains nothing, so that strategies.locas \(Locas\) would do nothing"),
        ("twice", "Locas trains another adapter in every task, and strategies.own"),
    ],
)
def test_a_wrong_combination_is_a_configuration_error(model: Path, tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        assemble(load_run(run_folder(tmp_path, wrong(model, tmp_path, case)) / "config.yaml"), World())


@pytest.mark.parametrize("case", ["random slots", "frozen"])
def test_memories_need_no_beginning_where_they_are_random_or_nothing_is_trained(
    model: Path, tmp_path: Path, case: str
) -> None:
    assemble(load_run(run_folder(tmp_path, wrong(model, tmp_path, case)) / "config.yaml"), World())


def test_a_dialogue_is_read_and_asked_about_and_resumed(model: Path, tmp_path: Path) -> None:
    turns = [{"speaker": "Ann", "dia_id": f"D1:{n}", "text": f"We saw {n} cats."} for n in range(6)]
    asked = [{"question": "What?", "answer": "cats", "category": 4, "evidence": ["D1:1"]}]
    samples = [{"sample_id": name, "conversation": {"session_1": turns}, "qa": asked} for name in ("a", "b")]
    (tmp_path / "talk.json").write_text(json.dumps(samples))
    data = run_of(model, tmp_path, "fresh")
    data["stream"] = {
        "class_path": "DialogueQAStream",
        "init_args": {
            "file": str(tmp_path / "talk.json"), "chunk": 16, "window": 32, "passes": 2, "max_new_tokens": 4,
            "question_template": "Q: {question}", "cache_dir": str(tmp_path / "cache"),
        },
    }  # fmt: skip
    assert_resumes_as_if_never_stopped(data, step=18, folder=tmp_path)
    found = table(next((tmp_path / "whole").rglob("config.yaml")).parent)
    assert {"loss", "f1", "f1_single_hop"} <= {cell.metric for cell in found.cells(2)}
    assert found.scores()[1][0] > found.scores()[0][0], "answers about what was read are likelier"
    assert torch.isfinite(torch.tensor(found.scores())).all()
