"""CLINC150 and Banking77 as docs/data.md describes them: classes, tasks, rows, and a small study that forgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from studies import run_folder, study

from clplat.components import Component, build, checked
from clplat.execution import execute
from clplat.journal import table
from clplat.streams.batch import IGNORE
from clplat.streams.labelled_rows import LabelledSource
from clplat.streams.labelled_text import LabelledTextStream
from clplat.streams.tokenizers import PretrainedTokenizer

ROOT = Path(__file__).parents[2]


def shipped(data: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, Any]:
    """The stream of the shipped study."""
    monkeypatch.setenv("CLPLAT_DATA", str(data))
    stream = yaml.safe_load((ROOT / "configs" / "benchmarks" / "clinc150.yaml").read_text())["stream"]
    stream["init_args"]["cache_dir"] = str(cache)
    return stream


def banking(data: Path, **options: Any) -> LabelledTextStream:
    source = LabelledSource(
        data_files={part: str(data / "banking77" / f"{part}.jsonl") for part in ("train", "test")},
        label_names=str(data / "banking77" / "labels.json"),
    )
    made = LabelledTextStream(source=source, num_tasks=7, **options)
    made.prepare()
    return made


def test_clinc150_has_ten_domains_of_fifteen_intents(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = shipped(data, monkeypatch, tmp_path)
    del stream["init_args"]["source"]["max_train_per_class"]
    made = build(checked(Component(**stream), "stream", "stream"), "stream", "stream")
    made.prepare()
    domains = json.loads((data / "clinc150" / "labels.json").read_text())["domains"]
    assert {task.name for task in made.tasks} == set(domains) and len(made.tasks) == 10
    assert made.spec.num_outputs == 150 and made.spec.scenario == "class"
    for task in made.tasks:
        assert len(task.classes) == len(domains[task.name]) == 15
        assert [len(task.train), len(task.val.data), len(task.test.data)] == [1500, 300, 450]
        assert torch.equal(task.train.targets.unique(return_counts=True)[1], torch.full((15,), 100))
    first = json.loads((data / "clinc150" / "train.jsonl").read_text().splitlines()[0])["text"]
    tokens = [token for token in made.tasks[0].train.inputs[0].tolist() if token != made.spec.pad_token]
    assert made.tokenizer.decode(tokens) == first


def test_banking77_has_seven_tasks_of_eleven_intents_and_its_official_rows(data: Path) -> None:
    made = banking(data)
    assert [len(task.classes) for task in made.tasks] == [11] * 7 and made.spec.num_outputs == 77
    assert sum(len(task.train) for task in made.tasks) == 10_003
    assert sum(len(task.test.data) for task in made.tasks) == 3_080 and all(task.val is None for task in made.tasks)
    assert torch.equal(made.tasks[2].test.data.targets.unique(return_counts=True)[1], torch.full((11,), 40))


def test_banking77_texts_end_in_their_label_with_the_tokens_of_a_pretrained_model(data: Path) -> None:
    tokenizer = PretrainedTokenizer(name=str(data / "stories260k"))
    made = banking(data, mode="language", tokenizer=tokenizer, max_tokens=96)
    names = json.loads((data / "banking77" / "labels.json").read_text())
    batch = made.tasks[6].train.batch(torch.arange(len(made.tasks[6].train)))
    spoken = {made.tokenizer.decode([t for t in row if t not in (IGNORE, 2)]).strip() for row in batch.targets.tolist()}
    assert spoken == {name.replace("_", " ") for name in names[66:]}
    scorer = made.tasks[6].test.scorer
    assert len(scorer.tokens) == 77 and len(made.tasks[6].test.data) == 100
    test = made.tasks[6].test.data.batch(torch.arange(100))
    assert set(scorer.numbers(test).tolist()) == set(made.tasks[6].classes)


def test_naive_training_forgets_clinc150_and_replay_keeps_more(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = shipped(data, monkeypatch, tmp_path / "cache")
    domains = json.loads((data / "clinc150" / "labels.json").read_text())["domains"]
    intents = {intent for name in ("travel", "work") for intent in domains[name][:5]}
    source = stream["init_args"]["source"]
    for part, name in source["data_files"].items():
        lines = Path(name.replace("${CLPLAT_DATA}", str(data))).read_text().splitlines()
        few = [line for line in lines if json.loads(line)["intent"] in intents]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(few) + "\n")
        source["data_files"][part] = str(tmp_path / f"{part}.jsonl")
    source |= {"max_train_per_class": 20, "max_eval_per_class": 10}
    replay = {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 60, "policy": "class_balanced"}}}
    last = {}
    for name, strategies in {"naive": {}, "er": replay}.items():
        made = study(
            stream=stream, strategies=strategies, training__budget={"epochs": 12},
            architecture={"class_path": "TextClassifier", "init_args": {"hidden_size": 32, "num_layers": 1}},
            training__optimizer={"class_path": "AdamW", "init_args": {"lr": 5e-3}},
        )  # fmt: skip
        folder = run_folder(tmp_path, made, name)
        assert execute(folder).status == "FINISHED"
        scores = table(folder).scores()
        assert min(scores[task + 1][task] for task in range(2)) > 0.6
        last[name] = scores[-1][0]
    assert last["naive"] < 0.2 and last["er"] > last["naive"] + 0.3
