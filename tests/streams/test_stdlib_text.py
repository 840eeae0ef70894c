"""The embedded text stream: made from the running Python alone, three kinds of text, answers that can be checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from caches import documents_of

from clplat.streams.stdlib_text import StdlibText


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StdlibText:
    made = StdlibText(cache_dir=str(tmp_path_factory.mktemp("cache")), max_train_tokens=40_000)
    made.prepare()
    return made


def test_three_tasks_have_rows_to_train_and_to_score(stream: StdlibText) -> None:
    assert stream.order() == "reference>source>arithmetic"
    for task in stream.tasks:
        assert task.val is not None
        assert len(task.train) >= 40_000 // 128 and len(task.test.data) == len(task.val.data) == 8_000 // 128
    assert [task.headline for task in stream.tasks] == ["loss", "loss", "answer_loss"]
    assert "exact_match" in stream.tasks[2].test.scorer.metrics


def test_each_task_reads_like_its_name(stream: StdlibText) -> None:
    reference, source, sums = (
        stream.tokenizer.decode(task.train.batch(torch.arange(50)).inputs.flatten().tolist()) for task in stream.tasks
    )
    assert "expression" in reference and "import " in source and "def " in source
    assert sums.startswith("Question: ") and "\n#### " in sums


def test_no_test_document_is_trained_on(stream: StdlibText) -> None:
    for domain in stream.domains:
        whole = list(stream._documents(domain, "train"))
        parts = [set(documents_of(domain, part, whole)) for part in ("train", "val", "test")]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_no_arithmetic_question_is_both_trained_and_tested(stream: StdlibText) -> None:
    arithmetic = stream.domains[2]
    whole = list(stream._documents(arithmetic, "train"))
    asked = {part: {one.prompt for one in documents_of(arithmetic, part, whole)} for part in ("train", "test")}
    assert len(asked["test"]) > 100 and not asked["train"] & asked["test"]


def test_another_order_has_the_same_data(stream: StdlibText) -> None:
    turned = StdlibText(order=["arithmetic", "reference"], cache_dir=str(stream.cache_dir), max_train_tokens=40_000)
    turned.prepare()
    assert turned.order() == "arithmetic>reference"
    assert turned.tasks[1].train.digest == stream.tasks[0].train.digest


def test_an_unknown_task_in_the_order_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="order: there is no domain 'poems'"):
        StdlibText(order=["poems"], cache_dir=str(tmp_path))
