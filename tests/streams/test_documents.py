"""Documents: articles, own splits, splits by hash, and errors that name domain and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from caches import documents_of

from clplat.streams.documents import Domain, Holdout, articles
from clplat.streams.tokens import Document


def lines(path: Path, rows: list[Any]) -> str:
    """`path`, filled with one row of JSON, or one line of text, per row."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def texts(domain: Domain, part: str) -> list[str]:
    return [document.text for document in documents_of(domain, part)]


def hundred(folder: Path, rows: list[int] | None = None) -> str:
    return lines(folder / f"rows-{rows[0] if rows else ''}.jsonl", [{"text": f"text {n}"} for n in rows or range(200)])


def test_parts_are_disjoint_and_together_everything(tmp_path: Path) -> None:
    domain = Domain(name="d", path="json", data_files={"train": hundred(tmp_path)}, holdout=Holdout(fraction=0.2))
    parts = {part: texts(domain, part) for part in ("train", "val", "test")}
    assert sorted(sum(parts.values(), [])) == sorted(f"text {n}" for n in range(200))
    assert all(20 < len(parts[part]) < 60 for part in ("val", "test"))


def test_the_place_of_a_document_depends_on_neither_order_nor_company(tmp_path: Path) -> None:
    held = Holdout(fraction=0.2)
    whole = Domain(name="d", path="json", data_files={"train": hundred(tmp_path)}, holdout=held)
    turned = hundred(tmp_path, list(range(150, 20, -1)))
    part = Domain(name="e", path="json", data_files={"train": turned}, holdout=held)
    for name in ("train", "val", "test"):
        assert set(texts(part, name)) == set(texts(whole, name)) & {f"text {n}" for n in range(21, 151)}


def test_a_sets_own_test_split_is_taken_whole_and_only_validation_is_held_out(tmp_path: Path) -> None:
    test = lines(tmp_path / "test.jsonl", [{"text": "mine"}])
    files = {"train": hundred(tmp_path), "test": test}
    domain = Domain(name="d", path="json", data_files=files, holdout=Holdout(fraction=0.2))
    assert texts(domain, "test") == ["mine"]
    assert len(texts(domain, "train")) + len(texts(domain, "val")) == 200
    assert texts(Domain(name="d", path="json", data_files={"test": test}), "val") == []


def test_an_article_begins_at_a_top_heading_only() -> None:
    found = list(
        articles(["", " = One = \n", " text \n", " = = Section = = \n", "= A =", "more", " = = = Deep = = = "])
    )
    assert found == ["", " = One = \n text \n = = Section = = ", "= A =\nmore\n = = = Deep = = = "]


def test_lines_become_articles_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "wiki.txt", ["", " = One = ", "first", " = Two = ", "second"])
    domain = Domain(name="wiki", path="text", document="heading", data_files={"test": path})
    assert texts(domain, "test") == [" = One = \nfirst", " = Two = \nsecond"]


def test_prompts_are_put_into_their_template_and_other_braces_stay(tmp_path: Path) -> None:
    path = lines(tmp_path / "qa.jsonl", [{"q": "{1} + 1?", "a": "2"}])
    domain = Domain(
        name="qa", path="json", data_files={"test": path}, prompt_field="q", answer_field="a",
        prompt_template="{Q} {prompt}\nA: ",
    )  # fmt: skip
    assert list(domain.documents("test")) == [Document(prompt="{Q} {1} + 1?\nA: ", text="2")]


def test_reading_stops_at_max_documents(tmp_path: Path) -> None:
    domain = Domain(name="d", path="json", data_files={"test": hundred(tmp_path)}, max_documents=7)
    assert texts(domain, "test") == [f"text {n}" for n in range(7)]


def test_files_of_other_columns_and_wildcards_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(tmp_path / "b.jsonl", [{"text": "two", "url": "u"}])
    lines(tmp_path / "a.jsonl", [{"text": "one"}])
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    domain = Domain(name="d", path="json", data_files={"test": "${SOMEWHERE}/*.jsonl"})
    assert texts(domain, "test") == ["one", "two"]


def test_the_source_follows_contents_and_reading_but_not_the_name_or_place(tmp_path: Path) -> None:
    first, moved = (lines(tmp_path / name, [{"text": "same"}]) for name in ("a.jsonl", "b.jsonl"))
    base = Domain(name="d", path="json", data_files={"test": first}).source()
    assert Domain(name="e", path="json", data_files={"test": moved}, max_train_tokens=5).source() == base
    assert Domain(name="d", path="json", data_files={"test": first}, max_documents=5).source() != base
    lines(tmp_path / "a.jsonl", [{"text": "other"}])
    assert Domain(name="d", path="json", data_files={"test": first}).source() != base


def test_a_revision_names_another_source() -> None:
    assert Domain(name="d", path="a/b", revision="v1").source() != Domain(name="d", path="a/b").source()


WRONG = {
    "no file": (Domain(name="d", path="json", data_files={"train": "/nowhere/x.jsonl"}),
                r"domain 'd', data_files\.train: there is no file /nowhere/x\.jsonl"),
    "unset variable": (Domain(name="d", path="json", data_files={"train": "${UNSET_HERE}/x"}),
                       r"domain 'd', data_files\.train: .*environment variable UNSET_HERE"),
    "part": (Domain(name="d", path="a/b", splits={"valid": "x"}), r"domain 'd': .*train, val and test.*'valid'"),
    "no files": (Domain(name="d", path="text"), "domain 'd': path 'text' needs data_files"),
    "no prompt": (Domain(name="d", path="a/b", exact_match=True), "domain 'd': .*need prompt_field"),
    "template": (Domain(name="d", path="a/b", prompt_field="q", prompt_template="Q"), "domain 'd': .*prompt_template"),
    "both": (Domain(name="d", path="a/b", data_files={"train": "x"}, splits={"train": "y"}), "domain 'd': .*not both"),
    "name": (Domain(name="a/b", path="a/b"), "domain 'a/b': a name is made of"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_domain_is_refused_by_name(case: str) -> None:
    domain, message = WRONG[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        domain.check()


def test_a_holdout_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holdout\.fraction"):
        Holdout(fraction=0.5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "x"}], r"domain 'd': rows have no text in the field 'text'; they have \['body'\]"),
        ([{"text": 3}], "domain 'd': rows have no text in the field 'text'"),
        (
            ['{"text": "x"}', "{broken"],
            r"domain 'd': 'json', split 'test' cannot be read from .*x\.jsonl .*; mend or replace",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_an_error_that_names_the_domain(
    tmp_path: Path, rows: list[Any], message: str
) -> None:
    domain = Domain(name="d", path="json", data_files={"test": lines(tmp_path / "x.jsonl", rows)})
    with pytest.raises(ValueError, match=message):
        list(domain.documents("test"))


def test_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine\n")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    domain = Domain(name="d", path="text", data_files={"train": str(tmp_path / "*.txt")})
    with pytest.raises(ValueError, match=r"cannot be read from .*latin\.txt \(.*\); convert it to UTF-8"):
        list(domain.documents("train"))


def test_a_set_that_the_hub_cannot_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="domain 'd': 'nobody/nothing', split 'train' cannot be read"):
        list(Domain(name="d", path="nobody/nothing").documents("train"))


def test_a_text_file_can_be_one_document(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n\n{name} += 1\n")
    whole = Domain(name="d", path="text", document="file", data_files={"train": str(tmp_path / "*.py")})
    assert [document.text for document in whole.documents("train")] == ["a = 1\n\na += 1\n", "b = 1\n\nb += 1\n"]
    with pytest.raises(ValueError, match="document: file reads text files whole; it needs path: text"):
        Domain(name="d", path="json", document="file", data_files={"train": str(tmp_path / "a.py")}).check()
