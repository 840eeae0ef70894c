"""From text to token ids: bytes, a byte-level BPE trained on the stream, or any tokenizer of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Tokenizer:
    """Base: ids for texts and back. `end_token` ends every document; `identity` names it in cache keys."""

    vocab_size: int
    end_token: int
    identity: str

    def train(self, texts: Iterable[str], cache_dir: Path, source: str) -> None:
        """Learn from the stream's training texts, where the tokenizer does that; `source` names them."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end token."""
        raise TypeError(f"{type(self).__name__} must define encode")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that ids stand for."""
        raise TypeError(f"{type(self).__name__} must define decode")

    def token_bytes(self) -> Tensor:
        """Bytes of text that each id stands for, (V,) float; 0 for special tokens."""
        raise TypeError(f"{type(self).__name__} must define token_bytes")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and an end token: nothing to learn, nothing to download."""

    vocab_size, end_token, identity = 257, 256, "bytes"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def token_bytes(self) -> Tensor:
        return torch.cat([torch.ones(256), torch.zeros(1)])


class _LibraryTokenizer(Tokenizer):
    """What both kinds on top of the tokenizers library share."""

    _library: Any

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._library.decode(list(tokens))


class BPETokenizer(_LibraryTokenizer):
    """Byte-level BPE of a small vocabulary, trained on the stream's training texts and kept by their content."""

    def __init__(self, *, vocab_size: int = 4096) -> None:
        """`vocab_size` counts the 256 bytes and the end token."""
        if vocab_size < 300:
            raise ValueError(f"BPETokenizer.vocab_size: at least 300, got {vocab_size}")
        self.vocab_size, self.end_token = vocab_size, 0
        self.identity = f"bpe-{vocab_size}-untrained"

    def train(self, texts: Iterable[str], cache_dir: Path, source: str) -> None:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        self.identity = f"bpe-{self.vocab_size}-{source}"
        path = cache_dir / "tokenizers" / f"{hashlib.sha256(self.identity.encode()).hexdigest()[:16]}.json"
        if not path.is_file():
            library = Library(models.BPE())
            library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            library.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=self.vocab_size, special_tokens=["<|end|>"], initial_alphabet=sorted(alphabet),
                show_progress=False,
            )  # fmt: skip
            library.train_from_iterator(_pieces(texts), trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            library.save(str(part))
            part.replace(path)
        self._library = Library.from_file(str(path))
        self.vocab_size = max(self.vocab_size, self._library.get_vocab_size())

    def token_bytes(self) -> Tensor:
        return _byte_level_lengths(self._library, self.vocab_size)


class PretrainedTokenizer(_LibraryTokenizer):
    """The fast tokenizer of a model on the hub or in a local folder."""

    def __init__(self, *, name: str) -> None:
        """`name`: hub id, or folder with tokenizer.json."""
        from transformers import AutoTokenizer

        try:
            whole = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"PretrainedTokenizer.name: {name!r} cannot be loaded ({str(error).splitlines()[0]})") from error
        if not whole.is_fast or whole.eos_token_id is None:
            raise ValueError(f"PretrainedTokenizer.name: {name!r} must be a fast tokenizer with an end token")
        self._library = whole.backend_tokenizer
        self.vocab_size, self.end_token = len(whole), whole.eos_token_id
        text = self._library.to_str()
        self.identity = f"pretrained-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def token_bytes(self) -> Tensor:
        if '"ByteLevel"' in self._library.to_str():
            return _byte_level_lengths(self._library, self.vocab_size)
        lengths = torch.zeros(self.vocab_size)
        for piece, token in self._library.get_vocab().items():
            lengths[token] = len(piece.replace("▁", " ").encode())
        lengths[self.end_token] = 0
        return lengths


def _byte_level_lengths(library: Any, size: int) -> Tensor:
    """In byte-level vocabularies every character of a piece stands for one byte."""
    special = {token.content for token in library.get_added_tokens_decoder().values()}
    lengths = torch.zeros(size)
    for piece, token in library.get_vocab().items():
        if piece not in special:
            lengths[token] = len(piece)
    return lengths


def _pieces(texts: Iterable[str], size: int = 100_000) -> Iterator[str]:
    """Long texts cut into pieces: the trainer works on one at a time."""
    for text in texts:
        yield from (text[start : start + size] for start in range(0, len(text), size))
