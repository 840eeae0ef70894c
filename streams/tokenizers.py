"""From text to token ids: bytes, a byte-level BPE trained on the stream, or any fast tokenizer of transformers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clplat.streams.cache_folder import made


class Tokenizer:
    """Base: ids for texts and back. `end_token` ends every document; `identity` names it in cache keys; `begin_token`
    stands before a prompt, where a pretrained model was trained so.

    All are known once `prepare` has been called.
    """

    vocab_size: int
    end_token: int
    identity: str
    begin_token: int | None = None

    def prepare(self, texts: Iterable[str], cache_dir: Path, source: str) -> None:
        """Load, or learn from the stream's training texts, which `source` names; called once, before all else."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end token."""
        raise TypeError(f"{type(self).__name__} must define encode")

    def encode_joined(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Ids of all texts in one array, the ids of each text, and its bytes: what token caches are written from."""
        encoded = self.encode(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.uint32, int(lengths.sum()))
        return ids, lengths, np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts))

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

    def encode_joined(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.frombuffer(b"".join(encoded), np.uint8), lengths, lengths

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def token_bytes(self) -> Tensor:
        return torch.cat([torch.ones(256), torch.zeros(1)])


class _LibraryTokenizer(Tokenizer):
    """What both kinds on top of the tokenizers library share."""

    _library: Any

    def _use(self, library: Any) -> None:
        self._library = library
        # Text that looks like a special token is text: it must not end a document.
        library.encode_special_tokens = True
        self.identity = hashlib.sha256(f"{self.end_token} {library.to_str()}".encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._library.decode(list(tokens))

    def token_bytes(self) -> Tensor:
        return piece_bytes(self._library, self.vocab_size)


class BPETokenizer(_LibraryTokenizer):
    """Byte-level BPE of a small vocabulary, trained on the stream's training texts and kept by their content."""

    def __init__(self, *, vocab_size: int = 4096) -> None:
        """`vocab_size` counts the 256 bytes and the end token; ids that small texts cannot fill stay unused."""
        if vocab_size < 257:
            raise ValueError(f"BPETokenizer.vocab_size: at least 257 (256 bytes and an end token), got {vocab_size}")
        self.vocab_size, self.end_token = vocab_size, 0

    def prepare(self, texts: Iterable[str], cache_dir: Path, source: str) -> None:
        from tokenizers import Tokenizer as Library

        key = hashlib.sha256(f"bpe {self.vocab_size} {source}".encode()).hexdigest()[:16]
        path = cache_dir / "tokenizers" / f"bpe-{key}.json"
        if not path.is_file():
            made(path.parent)
            with NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
                file.write(_trained(texts, self.vocab_size))
            Path(file.name).replace(path)
        text = path.read_text(encoding="utf-8")
        try:
            json.loads(text)
            library = Library.from_str(text)
        except Exception as error:  # the tokenizers library raises bare exceptions for what it cannot read
            raise ValueError(f"tokenizer {path} is damaged ({error}); delete the file and run again") from error
        self._use(library)


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"
)  # fmt: skip
"""Of which a folder must have one; without any the library fails without words."""
REMEDY = "give a hub id, a folder with tokenizer.json, or a folder and a gguf_file in it"


class PretrainedTokenizer(_LibraryTokenizer):
    """The fast tokenizer of a model on the hub or in a local folder."""

    def __init__(self, *, name: str, gguf_file: str | None = None) -> None:
        """`name`: hub id, or folder with tokenizer.json, variables expanded; or with a GGUF file, `gguf_file`."""
        self.name, self.gguf_file = name, gguf_file

    def prepare(self, texts: Iterable[str], cache_dir: Path, source: str) -> None:
        from transformers import AutoTokenizer

        path = os.path.expandvars(self.name)
        if unset := re.search(r"\$\{?(\w+)", path):
            raise ValueError(
                f"PretrainedTokenizer.name: {path} needs the environment variable {unset[1]}, which is not set"
            )
        if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise ValueError(f"PretrainedTokenizer.name: there is no folder {path}; {REMEDY}")
        if Path(path).is_dir() and not (self.gguf_file or any(Path(path, name).is_file() for name in TOKENIZER_FILES)):
            raise ValueError(f"PretrainedTokenizer.name: there is no tokenizer in {path}; {REMEDY}")
        try:
            whole = AutoTokenizer.from_pretrained(path, gguf_file=self.gguf_file)
        except (OSError, ValueError, KeyError) as error:
            # Of a GGUF file without a tokenizer the library says KeyError('tokens').
            missing = f"there is no tokenizer in {self.gguf_file}" if isinstance(error, KeyError) else ""
            reason = missing or str(error).partition("\n")[0]
            raise ValueError(
                f"PretrainedTokenizer.name: {self.name!r} cannot be loaded ({reason}); {REMEDY}"
            ) from error
        if not whole.is_fast or whole.eos_token_id is None:
            raise ValueError(f"PretrainedTokenizer.name: {self.name!r} must be a fast tokenizer with an end token")
        self.vocab_size, self.end_token = 1 + max(whole.get_vocab().values()), whole.eos_token_id
        begins = whole.bos_token_id is not None and whole("a").input_ids[0] == whole.bos_token_id
        self.begin_token = whole.bos_token_id if begins else None
        self._use(whole.backend_tokenizer)


def piece_bytes(library: Any, size: int) -> Tensor:
    """Bytes of text behind each id, (V,) float, for byte-level vocabularies and for those with byte fallback.

    Exact for the former. The latter (SentencePiece style) often put one space before a text, which is counted.
    Others, which fold case or drop spaces, do not say what their pieces stand for: a `ValueError`.
    """
    described = library.to_str()
    byte_level = '"ByteLevel"' in described
    if not byte_level and '"byte_fallback":true' not in described.replace(" ", ""):
        raise ValueError("tokenizer: only byte-level tokenizers and those with byte fallback give bits per byte")
    added = {token.content: token.special for token in library.get_added_tokens_decoder().values()}
    lengths = torch.zeros(size)
    for piece, token in library.get_vocab().items():
        if piece in added:
            lengths[token] = 0 if added[piece] else len(piece.encode())
        elif byte_level:
            lengths[token] = len(piece)  # every character stands for one byte
        else:
            lengths[token] = 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else len(piece.replace("▁", " ").encode())
    return lengths


def _trained(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE as JSON; the same texts give the same."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_pieces(texts), trainer)
    return library.to_str()


def _pieces(texts: Iterable[str], size: int = 100_000) -> Iterator[str]:
    """Long texts cut into pieces: the trainer works on one at a time."""
    for text in texts:
        yield from (text[start : start + size] for start in range(0, len(text), size))
