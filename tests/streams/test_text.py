"""Text streams from local files: tasks, caches, orders, probes, errors before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.streams.documents import Domain, Holdout
from clplat.streams.text import TextStream
from clplat.streams.tokenizers import BPETokenizer


@pytest.fixture
def domains(tmp_path: Path) -> list[Domain]:
    """Prose, held out by hash, and sums with their own test split."""

    def file(name: str, rows: list[dict[str, str]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    prose = file("prose.jsonl", [{"text": f"Story {n}: " + "once upon a time " * 3} for n in range(60)])
    sums = [{"question": f"{n} + 1?", "answer": f"It is #### {n + 1}"} for n in range(60)]
    files = {"train": file("sums.jsonl", sums[:50]), "test": file("sums_test.jsonl", sums[50:])}
    return [
        Domain(name="prose", path="json", data_files={"train": prose}, holdout=Holdout(fraction=0.2)),
        Domain(name="sums", path="json", data_files=files, prompt_field="question", exact_match=True),
    ]


def prepared(domains: list[Domain], cache: Path, **options: Any) -> TextStream:
    stream = TextStream(domains=domains, block_size=16, cache_dir=str(cache), **options)
    stream.prepare()
    return stream


def digests(stream: TextStream) -> dict[str, tuple[str, str]]:
    return {task.name: (task.train.digest, task.test.data.digest) for task in stream.tasks}


def test_tasks_have_training_test_and_validation_rows_and_their_headline(domains: list[Domain], tmp_path: Path) -> None:
    stream = prepared(domains, tmp_path / "cache")
    assert [(task.name, task.headline) for task in stream.tasks] == [("prose", "loss"), ("sums", "answer_loss")]
    assert stream.spec.kind == "language" and stream.spec.num_outputs == 257 and stream.spec.end_token == 256
    for task in stream.tasks:
        assert task.val is not None and len(task.train) and len(task.test.data) and len(task.val.data)
        assert task.headline in task.test.scorer.metrics and task.headline in task.val.scorer.metrics
    assert "exact_match" in stream.tasks[1].test.scorer.metrics
    assert "exact_match" not in stream.tasks[0].test.scorer.metrics


def test_rows_of_all_tasks_have_the_same_fields(domains: list[Domain], tmp_path: Path) -> None:
    first, second = (task.train.batch(torch.arange(2)) for task in prepared(domains, tmp_path / "cache").tasks)
    assert first.tensors().keys() == second.tensors().keys()
    assert first.answer is not None and not first.answer.any()
    assert second.answer is not None and second.answer.any()


def test_an_order_moves_tasks_and_changes_no_data(domains: list[Domain], tmp_path: Path) -> None:
    usual = prepared(domains, tmp_path / "cache", tokenizer=BPETokenizer(vocab_size=300))
    turned = prepared(
        domains, tmp_path / "cache", tokenizer=BPETokenizer(vocab_size=300), order=["sums", "prose"]
    )  # fmt: skip
    assert (usual.order(), turned.order()) == ("prose>sums", "sums>prose")
    assert digests(usual) == digests(turned)
    assert [task.index for task in turned.tasks] == [0, 1]
    assert turned.tasks[0].train.batch(torch.arange(1)).task.tolist() == [0]


def test_a_cache_is_made_once_and_found_again(
    domains: list[Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(domains, tmp_path / "cache")

    def never(*_: object) -> object:
        raise AssertionError("read again")

    monkeypatch.setattr(Domain, "documents", never)
    assert digests(prepared(domains, tmp_path / "cache")) == digests(first)


def test_other_contents_and_other_tokenizers_get_caches_of_their_own(domains: list[Domain], tmp_path: Path) -> None:
    before = digests(prepared(domains, tmp_path / "cache"))
    assert digests(prepared(domains, tmp_path / "cache", tokenizer=BPETokenizer(vocab_size=300))) != before
    path = Path(str(domains[0].data_files["train"]))
    path.write_text(path.read_text().replace("once", "twice"))
    after = digests(prepared(domains, tmp_path / "cache"))
    assert after["prose"] != before["prose"] and after["sums"] == before["sums"]


def test_a_damaged_cache_is_made_again_with_a_warning(domains: list[Domain], tmp_path: Path) -> None:
    before = digests(prepared(domains, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache" / "tokens").glob("prose-train-*")
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    with pytest.warns(UserWarning, match=f"token cache {folder} is damaged"):
        again = prepared(domains, tmp_path / "cache")
    assert digests(again) == before


def test_probes_are_scored_and_not_trained(domains: list[Domain], tmp_path: Path) -> None:
    probe = Domain(name="probe", path="json", data_files={"test": domains[0].data_files["train"]})
    stream = prepared(domains, tmp_path / "cache", probes=[probe])
    assert [task.name for task in stream.tasks] == ["prose", "sums"]
    assert [one.name for one in stream.probes] == ["probe"]


def test_scoring_is_capped(domains: list[Domain], tmp_path: Path) -> None:
    stream = prepared(domains, tmp_path / "cache", max_eval_tokens=40)
    assert {len(task.test.data) for task in stream.tasks} == {2}


def test_training_is_capped_behind_the_document_that_reaches_it(domains: list[Domain], tmp_path: Path) -> None:
    import dataclasses

    capped = [dataclasses.replace(domains[0], max_train_tokens=100), domains[1]]
    facts = prepared(capped, tmp_path / "cache").facts()
    assert facts["prose.train.documents"] == 2 and 100 <= facts["prose.train.tokens"] < 150


def test_facts_count_tokens_documents_and_bytes(domains: list[Domain], tmp_path: Path) -> None:
    facts = prepared(domains, tmp_path / "cache").facts()
    rows = [json.loads(line) for line in Path(str(domains[1].data_files["train"])).read_text().splitlines()]
    assert facts["prose.train.documents"] + facts["prose.held_out.documents"] == 60
    assert facts["sums.train.documents"] + facts["sums.held_out.documents"] == 60
    assert facts["sums.train.bytes"] < sum(len(row["question"]) + 1 + len(row["answer"]) for row in rows)


WRONG = {
    "order": ({"order": ["prose", "verse"]}, "order: there is no domain 'verse'"),
    "twice": ({"order": ["prose", "prose"]}, "order: each domain can stand there once"),
    "block": ({"block_size": 0}, "block_size: must be positive"),
    "cap": ({"max_eval_tokens": 5}, r"block_size: .*at most max_eval_tokens \(5\)"),
    "probe name": ({"probes": [Domain(name="prose", path="a/b")]}, "domains, probes: .*own name"),
    "none": ({"domains": []}, "domains, probes: give at least one domain"),
    "no train": ({"domains": [Domain(name="d", path="a/b", splits={"test": "test"})]}, "domain 'd': .*train part"),
    "no file": (
        {"domains": [Domain(name="d", path="text", data_files={"train": "gone.txt"})]},
        r"domain 'd', data_files\.train: there is no file gone\.txt",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_by_the_constructor(case: str, domains: list[Domain]) -> None:
    changes, message = WRONG[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TextStream(**({"domains": domains, "block_size": 16} | changes))


def test_a_part_too_small_for_one_row_is_refused_by_name(domains: list[Domain], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="domain 'sums': its test part has 10 documents .*block_size"):
        TextStream(domains=domains, block_size=400, cache_dir=str(tmp_path / "cache")).prepare()


def test_the_default_cache_folder_is_named_by_the_environment(
    domains: list[Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "elsewhere"))
    assert TextStream(domains=domains).cache_dir == tmp_path / "elsewhere"
