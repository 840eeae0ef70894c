"""Token caches of documents given by a test."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clplat.streams.documents import Domain
from clplat.streams.token_writer import Target, write_caches
from clplat.streams.tokenizers import ByteTokenizer, Tokenizer
from clplat.streams.tokens import Document, TokenCache


def written(
    folder: Path, documents: Iterable[Document], tokenizer: Tokenizer | None = None, max_tokens: int | None = None
) -> TokenCache:
    """All documents in one cache."""
    building = folder.with_name(folder.name + ".building")
    targets = {"train": Target(folder=folder, max_tokens=max_tokens)}
    write_caches(building, targets, documents, lambda _: "train", tokenizer or ByteTokenizer())
    return TokenCache(folder)


def documents_of(domain: Domain, part: str, split: Iterable[Document] | None = None) -> list[Document]:
    """The documents of one part: of its own split, or those of `split` (default: train) that are held out for it."""
    if part != "train" and domain.split_of(part) == part:
        return list(domain.documents(part))
    return [one for one in (split or domain.documents("train")) if domain.part_of(one) == part]
