"""Tokenizers: back and forth without loss, exact byte counts, the same result every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from clplat.streams.tokenizers import BPETokenizer, ByteTokenizer, PretrainedTokenizer, Tokenizer, piece_bytes

TEXTS = [
    "",
    "plain words, plain words",
    "  two  spaces\n\tand tabs\r\n",
    "naïve façade 日本語 🙂 \x00",
    "a <|end|> in text",
]


@pytest.fixture(params=["bytes", "bpe", "small bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    made = (
        ByteTokenizer() if request.param == "bytes" else BPETokenizer(vocab_size={"bpe": 400}.get(request.param, 257))
    )
    made.prepare(TEXTS * 5, tmp_path, "texts")
    return made


def test_every_text_comes_back_as_it_was(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS


def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert lengths[ids].sum() == len(text.encode())
    assert lengths[tokenizer.end_token] == 0


def test_no_text_contains_the_end_token(tokenizer: Tokenizer) -> None:
    assert all(tokenizer.end_token not in ids for ids in tokenizer.encode(TEXTS))
    assert tokenizer.decode([*tokenizer.encode(["ab"])[0], tokenizer.end_token]) == "ab"


def test_training_twice_gives_the_same_tokenizer_and_other_texts_another(tmp_path: Path) -> None:
    made = [BPETokenizer(vocab_size=300) for _ in range(3)]
    for number, (one, texts) in enumerate(zip(made, (TEXTS, TEXTS, ["xyz" * 50]), strict=True)):
        one.prepare(texts, tmp_path / str(number), "source")
    assert made[0].identity == made[1].identity != made[2].identity


def test_a_trained_tokenizer_is_kept_and_not_trained_again(tmp_path: Path) -> None:
    def never() -> object:
        raise AssertionError("trained again")
        yield ""

    first, second = BPETokenizer(vocab_size=300), BPETokenizer(vocab_size=300)
    first.prepare(TEXTS, tmp_path, "source")
    second.prepare(never(), tmp_path, "source")
    assert first.identity == second.identity
    assert [path.suffix for path in (tmp_path / "tokenizers").iterdir()] == [".json"]


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    BPETokenizer(vocab_size=300).prepare(TEXTS, tmp_path, "source")
    (path,) = (tmp_path / "tokenizers").iterdir()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=rf"tokenizer {path} is damaged .*delete the file"):
        BPETokenizer(vocab_size=300).prepare(TEXTS, tmp_path, "source")


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BPETokenizer\.vocab_size: at least 257"):
        BPETokenizer(vocab_size=200)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    remedy = "give a hub id, a folder with tokenizer.json, or a folder and a gguf_file in it"
    with pytest.raises(ValueError, match=rf"PretrainedTokenizer\.name: there is no folder .*nothing; {remedy}"):
        PretrainedTokenizer(name=str(tmp_path / "nothing")).prepare([], tmp_path, "")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=rf"PretrainedTokenizer\.name: there is no tokenizer in .*; {remedy}"):
        PretrainedTokenizer(name=str(tmp_path)).prepare([], tmp_path, "")
    with pytest.raises(ValueError, match=r"PretrainedTokenizer\.name: .* needs the environment variable NO_SUCH_PLACE"):
        PretrainedTokenizer(name="${NO_SUCH_PLACE}/model").prepare([], tmp_path, "")


def test_added_tokens_count_as_their_text_and_special_ones_as_nothing() -> None:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocab={"Ġ": 0, "a": 1}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<|é|>"])
    library.add_tokens([AddedToken("    ", normalized=False)])
    assert piece_bytes(library, 6).tolist() == [1, 1, 0, 4, 0, 0]


def test_byte_fallback_pieces_are_one_byte_and_other_vocabularies_are_refused() -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    fallback = Library(models.BPE(vocab={"<0x0A>": 0, "▁to": 1, "é": 2}, merges=[], byte_fallback=True))
    assert piece_bytes(fallback, 3).tolist() == [1, 3, 2]
    with pytest.raises(ValueError, match="byte fallback"):
        piece_bytes(Library(models.WordPiece(vocab={"[UNK]": 0, "##s": 1}, unk_token="[UNK]")), 2)
