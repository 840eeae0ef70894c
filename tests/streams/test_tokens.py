"""Token caches and the rows that are read from them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import written
from torch.utils.data import DataLoader

from clplat.streams.batch import IGNORE
from clplat.streams.tokenizers import ByteTokenizer
from clplat.streams.tokens import FILES, Document, TokenCache, TokenData

END = ByteTokenizer.end_token
DOCUMENTS = [Document(text="abcdefgh"), Document(prompt="1+1=", text="2"), Document(text="é"), Document(text="z" * 30)]


def cache(folder: Path, documents: list[Document] = DOCUMENTS, max_tokens: int | None = None) -> TokenCache:
    return written(folder, documents, max_tokens=max_tokens)


def flat(documents: list[Document]) -> list[int]:
    """The definition: prompt, text, end token, document after document."""
    return [token for one in documents for token in [*one.prompt.encode(), *one.text.encode(), END]]


def test_a_cache_holds_every_document_with_its_end_token(tmp_path: Path) -> None:
    opened = cache(tmp_path / "c")
    assert opened.tokens.tolist() == flat(DOCUMENTS)
    assert opened.document(1) == (list(b"1+1="), list(b"2"))
    assert opened.document(2) == ([], list("é".encode()))
    assert opened.bytes == 8 + 5 + 2 + 30
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_row_is_the_window_from_rT_to_rT_plus_T_and_targets_are_one_ahead(tmp_path: Path) -> None:
    data, tokens = TokenData(cache(tmp_path / "c"), length=5, task=2), flat(DOCUMENTS)
    assert len(data) == (len(tokens) - 1) // 5
    batch = data.batch(torch.tensor([3, 0]))
    assert batch.inputs.tolist() == [tokens[15:20], tokens[0:5]]
    assert batch.task is not None and batch.task.tolist() == [2, 2]
    counted = batch.targets != IGNORE
    ahead = torch.tensor([tokens[16:21], tokens[1:6]])
    assert torch.equal(batch.targets[counted], ahead[counted])


def test_exactly_the_first_token_of_each_document_is_no_target(tmp_path: Path) -> None:
    opened = cache(tmp_path / "c")
    for length in (1, 3, 7):
        data = TokenData(opened, length=length, task=0)
        batch = data.batch(torch.arange(len(data)))
        ignored = (batch.targets.flatten() == IGNORE).nonzero().flatten() + 1
        assert ignored.tolist() == [end for end in opened.ends[:-1].tolist() if end <= len(data) * length]


def test_segments_rise_by_one_behind_each_end_token(tmp_path: Path) -> None:
    data = TokenData(cache(tmp_path / "c"), length=9, task=0)
    batch = data.batch(torch.arange(len(data)))
    assert batch.segment_ids is not None
    assert (batch.segment_ids[:, 0] == 0).all()
    assert torch.equal(batch.segment_ids.diff(dim=1), (batch.inputs[:, :-1] == END).long())


def test_answer_marks_are_the_text_behind_a_prompt_and_its_end_token(tmp_path: Path) -> None:
    data = TokenData(cache(tmp_path / "c"), length=20, task=0, answers=True)
    batch = data.batch(torch.arange(1))
    assert batch.answer is not None
    assert batch.targets[batch.answer].tolist() == [ord("2"), END]
    only = TokenData(cache(tmp_path / "d"), length=20, task=0, answers=True, answers_only=True).batch(torch.arange(1))
    assert only.targets[only.targets != IGNORE].tolist() == [ord("2"), END]


def test_a_cap_takes_rows_spread_over_the_whole(tmp_path: Path) -> None:
    opened = cache(tmp_path / "c", [Document(text="".join(chr(97 + n % 26) for n in range(200)))])
    capped, whole = TokenData(opened, length=10, task=0, max_rows=4), TokenData(opened, length=10, task=0)
    assert (len(capped), len(whole)) == (4, 20)
    assert torch.equal(capped.batch(torch.arange(4)).inputs, whole.batch(torch.tensor([0, 5, 10, 15])).inputs)
    assert capped.nbytes == 4 * 10 * 2


def test_writing_stops_behind_the_document_that_reaches_the_token_limit(tmp_path: Path) -> None:
    assert len(cache(tmp_path / "c", max_tokens=10).prompts) == 2
    assert len(cache(tmp_path / "d", max_tokens=9).prompts) == 1


def test_the_digest_follows_the_content_and_the_cut_into_rows(tmp_path: Path) -> None:
    first, again = cache(tmp_path / "a"), cache(tmp_path / "b")
    assert first.digest == again.digest
    # The same tokens with another border between prompt and answer are other data.
    moved = [DOCUMENTS[0], Document(prompt="1+1", text="=2"), *DOCUMENTS[2:]]
    assert cache(tmp_path / "c", moved).digest != first.digest
    digests = {TokenData(first, length=length, task=0, max_rows=rows).digest for length in (4, 5) for rows in (2, None)}
    assert len(digests) == 4


@pytest.mark.parametrize("name", [*FILES, "head.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_refused_with_its_folder_and_the_fix(tmp_path: Path, name: str, damage: str) -> None:
    folder = cache(tmp_path / "c").folder
    content = bytearray((folder / name).read_bytes())
    if damage == "gone":
        (folder / name).unlink()
    else:
        content[-5] ^= 1
        (folder / name).write_bytes(content[:-5] if damage == "cut" else content)
    with pytest.raises(ValueError, match=rf"token cache {folder} is damaged .*delete the folder"):
        TokenCache(folder)


def test_a_header_that_was_edited_is_refused(tmp_path: Path) -> None:
    folder = cache(tmp_path / "c").folder
    sealed = json.loads((folder / "head.json").read_text())
    sealed["head"]["bytes"] += 1
    (folder / "head.json").write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match="head.json was changed"):
        TokenCache(folder)


def test_the_second_of_two_writers_accepts_the_first_ones_cache(tmp_path: Path) -> None:
    first = cache(tmp_path / "c")
    assert cache(tmp_path / "c").digest == first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_empty_part_is_a_cache_without_rows(tmp_path: Path) -> None:
    assert len(TokenData(cache(tmp_path / "c", []), length=4, task=0)) == 0


def test_large_vocabularies_are_kept_in_four_bytes(tmp_path: Path) -> None:
    class Large(ByteTokenizer):
        vocab_size, end_token = 70_000, 69_999

    opened = written(tmp_path / "c", DOCUMENTS[:1], Large())
    assert opened.tokens.dtype == np.uint32 and opened.tokens[-1] == 69_999


def test_loader_processes_read_the_same_rows_and_the_tokens_are_not_pickled(tmp_path: Path) -> None:
    long = TokenData(cache(tmp_path / "c", [Document(text="x" * 50_000)] + DOCUMENTS), length=5, task=1, answers=True)
    assert len(pickle.dumps(long)) < 5_000
    here, rows = long.batch(torch.tensor([7, 10_001])), [torch.tensor([7, 10_001])]
    there = next(iter(DataLoader(_Rows(long), sampler=rows, batch_size=None, num_workers=1)))
    copied = pickle.loads(pickle.dumps(long)).batch(rows[0])
    for other in (there, copied):
        assert all(torch.equal(other.tensors()[name], tensor) for name, tensor in here.tensors().items())


class _Rows(torch.utils.data.Dataset):
    def __init__(self, data: TokenData) -> None:
        self.data = data

    def __getitem__(self, rows: torch.Tensor) -> object:
        return self.data.batch(rows)
