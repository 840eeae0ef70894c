"""Labelled text in whole runs: every strategy works on it, unseen classes stay hidden, and wrong models are refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import EWC, REPLAY, run_folder, study

from clplat.assembly import assemble
from clplat.errors import ConfigError
from clplat.evaluation import View
from clplat.execution import execute
from clplat.journal import last_status, table
from clplat.strategies.world import World
from clplat.study_file import expand, load_study

GROUPS = {"fruit": ["apple", "pear"], "tool": ["saw", "rake"], "pet": ["cat", "dog"]}
CLASSIFIER = {"class_path": "TextClassifier", "init_args": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
LANGUAGE = {"class_path": "Transformer", "init_args": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
STRATEGIES: dict[str, dict[str, Any]] = {
    "naive": {},
    "replay": {"replay": REPLAY},
    "derpp": {"derpp": {"class_path": "DERpp", "init_args": {"capacity": 12, "policy": "class_balanced"}}},
    "ewc": {"ewc": {"class_path": "EWC", "init_args": {"strength": 1.0}}},
    "online-ewc": {"ewc": EWC},
    "joint": {"data": {"class_path": "Joint"}},
    "cumulative": {"data": {"class_path": "Cumulative"}},
}


@pytest.fixture
def stream(tmp_path: Path) -> dict[str, Any]:
    """Six labels that two words of a text give away, among words that say nothing."""
    chance, files, filler = random.Random(0), {}, ["is", "it", "the", "of", "my", "his", "no"]
    for part, count in {"train": 24, "val": 4, "test": 8}.items():
        rows = []
        for label in [label for labels in GROUPS.values() for label in labels] * count:
            words = chance.sample(filler, chance.randint(1, 4)) + [label[:2]] * 2
            rows.append({"text": " ".join(words), "label": label})
        files[part] = str(tmp_path / f"{part}.jsonl")
        Path(files[part]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"class_path": "LabelledTextStream", "init_args": {"source": {"data_files": files}, "groups": GROUPS}}


def labelled(stream: dict[str, Any], mode: str = "classify", **changes: Any) -> dict[str, Any]:
    stream["init_args"] |= {"mode": mode}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 1e-2}}
    given = {"architecture": CLASSIFIER if mode == "classify" else LANGUAGE, "training__optimizer": optimizer}
    return study(stream=stream, **given | changes)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_on_token_rows(stream: dict[str, Any], tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path, labelled(stream, strategies=STRATEGIES[name], training__budget={"steps": 4}))
    execute(folder)
    assert last_status(folder) == "FINISHED"
    scores = table(folder).scores()[-1]
    assert len(scores) == 3 and all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize("name", ["replay", "online-ewc", "cumulative"])
def test_strategies_run_on_texts_that_end_in_their_label(stream: dict[str, Any], tmp_path: Path, name: str) -> None:
    data = labelled(stream, "language", strategies=STRATEGIES[name], training__budget={"steps": 4})
    folder = run_folder(tmp_path, data)
    execute(folder)
    assert last_status(folder) == "FINISHED"
    assert all(0 <= score <= 1 for score in table(folder).scores()[-1])


def test_a_language_model_learns_to_write_the_label(stream: dict[str, Any], tmp_path: Path) -> None:
    data = labelled(stream, "language", training__budget={"steps": 120})
    folder = run_folder(tmp_path, data)
    execute(folder)
    assert table(folder).scores()[1][0] > 0.8


@pytest.mark.parametrize("mode", ["classify", "language"])
def test_tasks_that_were_not_seen_have_no_score(stream: dict[str, Any], mode: str) -> None:
    parts = assemble(expand(load_study(labelled(stream, mode)))[0], World())
    cells = {cell.task: cell.value for cell in parts.evaluator.cells([0, 2]) if cell.headline}
    assert math.isnan(cells["tool"]) and 0 <= cells["fruit"] <= 1 and 0 <= cells["pet"] <= 1


def test_a_scorer_learns_which_classes_were_seen(stream: dict[str, Any]) -> None:
    parts = assemble(expand(load_study(labelled(stream, "language")))[0], World())
    view = View(parts.architecture, parts.learner.objective, parts.hooks, [2, 0], "32-true")
    assert view.classes_seen() == [0, 1, 4, 5]


def test_no_token_is_hidden_from_a_language_whose_labels_are(stream: dict[str, Any]) -> None:
    parts = assemble(expand(load_study(labelled(stream, "language")))[0], World())
    batch = parts.stream.tasks[1].test.data.batch(torch.arange(4))
    view = View(parts.architecture, parts.learner.objective, parts.hooks, [0], "32-true")
    with torch.no_grad():
        assert bool(view.logits(batch).isfinite().all())


@pytest.mark.parametrize(
    ("architecture", "mode", "message"),
    [
        ({"class_path": "MLP"}, "classify", "MLP: reads numbers, .*use TextClassifier"),
        (LANGUAGE, "classify", "use TextClassifier"),
        (CLASSIFIER, "language", "use Transformer for language"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_one_to_use(
    stream: dict[str, Any], architecture: dict[str, Any], mode: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(expand(load_study(labelled(stream, mode, architecture=architecture)))[0], World())
