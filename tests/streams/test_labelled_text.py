"""Labelled text: classes become tasks, texts become padded rows or texts that end in their label; errors by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.streams.batch import IGNORE
from clplat.streams.documents import Holdout
from clplat.streams.labelled_rows import LabelledSource
from clplat.streams.labelled_text import LabelledTextStream

GROUPS = {"fruit": ["apple", "pear_tree"], "tool": ["saw", "hammer"], "pet": ["cat", "dog"]}
OWNER = {label: group for group, labels in GROUPS.items() for label in labels}
NUMBERED = sorted(OWNER)
ROWS = {"train": 6, "val": 2, "test": 4}


def row(label: str, part: str, number: int) -> dict[str, Any]:
    return {"text": f"{part} text {number} on {label}" + "!" * number, "intent": label, "domain": OWNER[label],
            "label": NUMBERED.index(label)}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A file for each part, the groups in the order tool, pet, fruit."""
    for part, count in ROWS.items():
        labels = [*GROUPS["tool"], *GROUPS["pet"], *GROUPS["fruit"]]
        lines = [json.dumps(row(label, part, number)) for label in labels for number in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return {part: str(tmp_path / f"{part}.jsonl") for part in ROWS}


def stream(files: dict[str, Any], source: dict[str, Any] | None = None, **options: Any) -> LabelledTextStream:
    given = {"data_files": files, "label_field": "intent", "group_field": "domain"} | (source or {})
    made = LabelledTextStream(source=LabelledSource(**given), **options)
    made.prepare()
    return made


def texts(made: LabelledTextStream, data: Any) -> list[str]:
    return [made.tokenizer.decode(row) for row in data.inputs.tolist()]


def labels_in(made: LabelledTextStream, data: Any) -> set[str]:
    """The labels that the texts of a set are about."""
    return {text.split(" on ")[1].rstrip("!") for text in texts(made, data)}


def test_the_rows_own_field_makes_tasks_in_order_of_appearance(files: dict[str, Any]) -> None:
    made = stream(files)
    assert made.order() == "tool>pet>fruit"
    for task in made.tasks:
        sets = {"train": task.train, "val": task.val.data, "test": task.test.data}
        assert {part: len(data) for part, data in sets.items()} == {part: 2 * n for part, n in ROWS.items()}
        assert all(labels_in(made, data) == set(GROUPS[task.name]) for data in sets.values())


@pytest.mark.parametrize("kind", ["mapping", "file", "key"])
def test_groups_are_a_mapping_or_stand_in_a_json_file(
    files: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDER", str(tmp_path))
    (tmp_path / "groups.json").write_text(json.dumps(GROUPS))
    (tmp_path / "labels.json").write_text(json.dumps({"intents": NUMBERED, "domains": GROUPS}))
    given = {"mapping": GROUPS, "file": "${FOLDER}/groups.json", "key": "${FOLDER}/labels.json#domains"}[kind]
    made = stream(files, {"group_field": None}, groups=given)
    assert made.order() == "fruit>tool>pet"
    assert [labels_in(made, task.train) for task in made.tasks] == [set(labels) for labels in GROUPS.values()]


def test_equal_parts_take_the_labels_as_numbered_as_listed_or_as_the_seed_says(files: dict[str, Any]) -> None:
    def parts(**options: Any) -> list[set[str]]:
        made = stream(files, {"group_field": None}, num_tasks=3, **options)
        return [labels_in(made, task.train) for task in made.tasks]

    assert parts() == [set(NUMBERED[:2]), set(NUMBERED[2:4]), set(NUMBERED[4:])]
    turned = NUMBERED[::-1]
    assert parts(class_order=turned) == [set(turned[:2]), set(turned[2:4]), set(turned[4:])]
    drawn = [parts(class_order="seeded", seed=seed) for seed in range(4)]
    assert drawn[0] == parts(class_order="seeded", seed=0) and any(other != drawn[0] for other in drawn)
    assert parts(order=[2, 0, 1]) == [parts()[place] for place in (2, 0, 1)]


def test_tasks_are_ordered_by_name_by_number_or_by_the_seed(files: dict[str, Any]) -> None:
    assert stream(files, order=["fruit", "tool", "pet"]).order() == "fruit>tool>pet"
    assert stream(files, order=[2, 0, 1]).order() == "fruit>tool>pet"
    orders = {stream(files, order="seeded", seed=seed).order() for seed in range(6)}
    assert len(orders) > 1 and stream(files, order="seeded", seed=1).order() in orders


def test_units_are_numbered_in_order_of_appearance_and_shared_in_the_domain_scenario(files: dict[str, Any]) -> None:
    made = stream(files, order=["pet", "tool", "fruit"])
    assert [task.classes for task in made.tasks] == [(0, 1), (2, 3), (4, 5)]
    spoken = zip(texts(made, made.tasks[1].train), made.tasks[1].train.targets.tolist(), strict=True)
    assert {(text.split(" on ")[1].rstrip("!"), unit) for text, unit in spoken} == {("saw", 2), ("hammer", 3)}
    shared = stream(files, scenario="domain")
    assert shared.spec.num_outputs == 2 and [task.classes for task in shared.tasks] == [(0, 1)] * 3


def test_the_order_of_tasks_changes_no_row_and_no_set(files: dict[str, Any]) -> None:
    first, second = stream(files), stream(files, order=["fruit", "tool", "pet"])
    for task in first.tasks:
        other = next(t for t in second.tasks if t.name == task.name)
        assert torch.equal(task.train.inputs, other.train.inputs)
        assert torch.equal(task.test.data.inputs, other.test.data.inputs)


def test_rows_are_tokens_padded_on_the_right_with_the_end_token_and_cut(files: dict[str, Any]) -> None:
    made = stream(files)
    spec, batch = made.spec, made.tasks[0].train.batch(torch.tensor([5, 0]))
    assert spec.kind == "classify" and spec.num_outputs == 6 and (spec.vocab_size, spec.pad_token) == (257, 256)
    assert batch.inputs.dtype == batch.targets.dtype == torch.long and batch.inputs.shape == (2, *spec.input_shape)
    texts = [row(GROUPS["tool"][0], "train", number)["text"].encode() for number in (5, 0)]
    for tokens, text in zip(batch.inputs.tolist(), texts, strict=True):
        assert bytes(tokens[: len(text)]) == text and set(tokens[len(text) :]) <= {256}
    assert batch.task.tolist() == [0, 0] and batch.answer is None
    longest = max(len(row(label, "train", 5)["text"]) for label in OWNER)
    assert spec.input_shape == (longest,)
    assert stream(files, max_tokens=7).spec.input_shape == (7,)


def test_tokens_take_four_bytes_and_stay_rows_of_tokens_on_another_device(files: dict[str, Any]) -> None:
    train = stream(files, mode="language").tasks[0].train
    assert train.nbytes == 2 * 4 * train.inputs.numel()
    moved = train.to("cpu")
    assert type(moved) is type(train) and moved.tokens_per_row == train.inputs.shape[1]
    assert torch.equal(moved.batch(torch.tensor([3])).answer, train.batch(torch.tensor([3])).answer)


def test_labels_as_numbers_count_the_names_and_labels_in_no_group_are_left_out(files: dict[str, Any]) -> None:
    source = {"label_field": "label", "label_names": NUMBERED, "group_field": None}
    made = stream(files, source, groups={"a": ["dog", "saw"], "b": ["cat"]})
    assert [labels_in(made, task.train) for task in made.tasks] == [{"dog", "saw"}, {"cat"}]
    assert made.spec.num_outputs == 3


def test_csv_is_read_as_json_lines_are(files: dict[str, Any], tmp_path: Path) -> None:
    plain = {}
    for part, count in ROWS.items():
        rows = [row(label, part, number) for labels in GROUPS.values() for label in labels for number in range(count)]
        lines = [",".join(map(str, one.values())) for one in rows]
        (tmp_path / f"{part}.csv").write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
        plain[part] = str(tmp_path / f"{part}.csv")
    made, expected = stream(plain, {"path": "csv"}), stream(files, order=["fruit", "tool", "pet"])
    assert [task.train.digest for task in made.tasks] == [task.train.digest for task in expected.tasks]


def test_small_studies_keep_the_first_rows_of_each_class(files: dict[str, Any]) -> None:
    made = stream(files, {"max_train_per_class": 2, "max_eval_per_class": 1})
    assert [(len(t.train), len(t.val.data), len(t.test.data)) for t in made.tasks] == [(4, 2, 2)] * 3
    assert all(" text 0 on " in text or " text 1 on " in text for text in texts(made, made.tasks[0].train))


def test_without_a_val_part_all_rows_are_trained_on_unless_a_holdout_is_asked_for(files: dict[str, Any]) -> None:
    two = {part: files[part] for part in ("train", "test")}
    whole, held = stream(two), stream(two, {"holdout": Holdout(fraction=0.3)})
    assert all(task.val is None for task in whole.tasks) and sum(len(task.train) for task in whole.tasks) == 36
    kept = [set(texts(held, data)) for t in held.tasks for data in (t.train, *([t.val.data] if t.val else []))]
    assert sum(map(len, kept)) == 36 and sum(len(task.train) for task in held.tasks) < 36


def test_a_language_row_is_the_prompt_and_its_label_of_which_only_the_label_is_learned(files: dict[str, Any]) -> None:
    made = stream(files, mode="language")
    assert made.spec.kind == "language" and made.spec.num_outputs == 257 and made.spec.scenario == "class"
    for task in made.tasks:
        batch = task.train.batch(torch.arange(len(task.train)))
        assert torch.equal(batch.answer, batch.targets != IGNORE) and batch.inputs.shape[1:] == made.spec.input_shape
        for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            text = made.tokenizer.decode(tokens)
            label = text.split(" on ")[1].split("\n")[0].rstrip("!").replace("_", " ")
            learned = [token for token in targets if token != IGNORE]
            assert text.endswith(f"\nlabel: {label}") and learned == [*f" {label}".encode(), 256]
            start = targets.index(learned[0])
            assert tokens[start + 1 : start + len(learned)] == learned[:-1]


def test_a_language_scores_some_rows_evenly_spread_over_each_set(files: dict[str, Any]) -> None:
    made = stream(files, mode="language", max_answers=4)
    for task in made.tasks:
        found = [text.split("\n")[0] for text in texts(made, task.test.data)]
        wanted = [row(label, "test", number)["text"] for label in GROUPS[task.name] for number in (0, 2)]
        assert found == wanted and len(task.train) == 12


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"data_files": {"train": "none.jsonl"}}, {}, "data_files.train: there is no file none.jsonl"),
        ({"max_train_per_class": 0}, {}, "source.max_train_per_class: at least 1"),
        ({"label_names": ["a", "a"]}, {}, "source.label_names: 'a' stands there twice"),
        ({"label_names": "no.json"}, {}, "source.label_names: there is no file no.json"),
        ({"label_names": "${NO_SUCH}/a.json"}, {}, "source.label_names: .*variable NO_SUCH"),
        ({}, {"num_tasks": 3}, "num_tasks, groups, source.group_field: give exactly one"),
        ({"group_field": None}, {}, "num_tasks, groups, source.group_field: give exactly one"),
        ({}, {"class_order": ["cat"]}, "class_order: goes with num_tasks"),
        ({}, {"max_tokens": 0}, "max_tokens, max_answers"),
        ({}, {"prompt_template": "what?"}, "prompt_template: needs {text} once"),
        ({}, {"mode": "language", "scenario": "domain"}, "scenario: domain shares output units"),
        ({"group_field": None}, {"groups": {"a b": ["cat"]}}, "groups: 'a b' is to name a task"),
        ({"group_field": None}, {"groups": {"a": ["cat"], "b": ["cat"]}}, "groups: the label 'cat' stands there 2"),
        ({"group_field": None}, {"groups": {"a": []}}, "groups: a mapping of task names to lists"),
        ({"group_field": None}, {"groups": {}}, "groups: a mapping of task names to lists"),
    ],
)
def test_wrong_options_are_refused_by_the_constructor(
    files: dict[str, Any], source: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    given = {"data_files": files, "label_field": "intent", "group_field": "domain"} | source
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LabelledTextStream(source=LabelledSource(**given), **options)


def test_files_without_text_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text(json.dumps(row("cat", "train", 0) | {"text": " "}) + "\n")
    with pytest.raises(ValueError, match="source: its train part has no row with text"):
        stream(files | {"train": str(tmp_path / "blank.jsonl")})


def test_an_empty_file_is_a_part_without_rows(files: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="source: its train part has no row with text"):
        stream(files | {"train": str(tmp_path / "empty.jsonl")})


def test_the_row_with_a_wrong_label_is_named(files: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(files["test"]).read_text().splitlines()
    lines[4] = lines[4].replace('"intent": "hammer"', '"intent": "hamer"')
    (tmp_path / "wrong.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="source.label_names: row 5 of test has the label 'hamer', not one of the 6"):
        stream(files | {"test": str(tmp_path / "wrong.jsonl")}, {"label_names": NUMBERED})
    with pytest.raises(ValueError, match=r"the test part has labels that no training row has \(hamer\)"):
        stream(files | {"test": str(tmp_path / "wrong.jsonl")})
    chosen = stream(files | {"test": str(tmp_path / "wrong.jsonl")}, {"group_field": None}, groups=GROUPS)
    assert sum(len(task.test.data) for task in chosen.tasks) == 23


def test_a_missing_test_part_is_refused(files: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="source: there is no test part; .* or give a holdout"):
        stream({"train": files["train"]})


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"label_field": "class"}, {}, r"row 1 of train has nothing in the field 'class'; its fields are \['domain'"),
        ({"label_field": "label", "label_names": ["a", "b"]}, {}, "row 1 of train has the label 5, not one of the 2"),
        ({}, {"order": ["pet", "tool"]}, r"order: name the tasks \['tool', 'pet', 'fruit'\], each once"),
        ({}, {"order": ["pet", "tool", "pets"]}, "order: name the tasks"),
        ({"group_field": None}, {"groups": {"a": ["dgo"]}}, "groups.a: there is no label 'dgo'; did you mean 'dog'"),
        ({"group_field": None}, {"num_tasks": 4}, "num_tasks: 6 classes cannot be split into 4"),
        ({"group_field": "text"}, {}, "source.group_field: the label 'saw' has rows of two groups"),
        ({"group_field": None}, {"groups": {"a": ["dog"], "b": ["cat", "saw"]}, "scenario": "domain"},
         r"scenario: domain needs tasks of as many classes each; these have \[1, 2\]"),
    ],
)  # fmt: skip
def test_what_the_rows_contradict_is_refused_by_name(
    files: dict[str, Any], source: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream(files, source, **options)
