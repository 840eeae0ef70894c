"""What written answers are worth, against values worked out by hand."""

from __future__ import annotations

import pytest

from clplat.streams import answer_metrics
from clplat.streams.answer_metrics import AnswerMetric, answer_value, edit_similarity, sari


@pytest.mark.parametrize(
    ("metric", "wanted", "written", "value"),
    [
        ("choice", "B\nA clause is …", "The answer is B. Because A", 1),
        ("choice", "B", "A or B", 0),
        ("choice", "C", "选C吧", 1),
        ("choice", "A", "Avoid", 0),
        ("choice", "A", "", 0),
        ("number", "1,234.50", "It is 1234.5 metres", 1),
        ("number", "-3", "3", 0),
        ("number", "Friday", " friday", 1),
        ("number", "Friday", "5", 0),
        ("exact_match", "a b ", " a b", 1),
        ("exact_match", "", "", 0),
        ("rouge_l", "the cat sat", "the cat", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("rouge_l", "the cat", "no dog", 0),
    ],
)
def test_an_answer_is_worth_what_its_metric_says(metric: AnswerMetric, wanted: str, written: str, value: float) -> None:
    assert answer_value(metric)("a prompt", wanted, written) == pytest.approx(value)


def test_edit_similarity_counts_insertions_and_deletions_and_takes_literals_as_their_text() -> None:
    assert edit_similarity("abcd", "abxd") == pytest.approx(1 - 2 / 8)
    assert edit_similarity("f ( <STR_LIT:name> )", "f ( name )") == 1
    assert edit_similarity("x = <NUM_LIT:0> <STR_LIT>", "x = 0") == 1


def test_sari_of_the_reference_is_1_and_of_the_unchanged_source_what_its_formula_gives() -> None:
    assert sari("a b", "a c", "A c") == 1
    # 1-grams: keep precision 1/2, recall 1, so F1 2/3; nothing deleted, 1; nothing added where c should be, 0.
    # 2-grams: keep 0, delete 1, add 0. 3- and 4-grams: there are none, 1.
    assert sari("a b", "a c", "a b") == pytest.approx(((2 / 3 + 1 + 0) / 3 + (0 + 1 + 0) / 3 + 1 + 1) / 4)
    # 1-grams: a should have been kept, 0 of 1; b was rightly deleted, a not: 1/2; x is added in place of c: 0.
    # 2-grams: keep: 0/0 is 1; "a b" rightly deleted, 1; nothing added (1) where "a c" should be (0): 0.
    assert sari("a b", "a c", "x") == pytest.approx(((0 + 1 / 2 + 0) / 3 + (1 + 1 + 0) / 3 + 1 + 1) / 4)


def test_a_metric_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_metrics, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"metric sari: sacrebleu is not installed; pip install 'clplat\[pretrained\]'"
    ):
        answer_value("sari")
    assert answer_value("choice")("", "A", "A") == 1
