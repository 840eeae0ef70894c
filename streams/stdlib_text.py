"""The embedded text stream: three kinds of text that every Python has, so nothing is downloaded."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from clplat.streams.arithmetic import problems
from clplat.streams.documents import Domain, Holdout, Part
from clplat.streams.text import TextStream
from clplat.streams.tokenizers import Tokenizer
from clplat.streams.tokens import Document

KINDS = ("reference", "source", "arithmetic")


class StdlibText(TextStream):
    """Python's language reference, then the standard library's source, then generated word problems with answers.

    The first two come from the running Python and differ a little between its versions; data digests say so.
    """

    def __init__(
        self,
        *,
        order: list[str] | None = None,
        tokenizer: Tokenizer | None = None,
        block_size: int = 128,
        max_train_tokens: int = 400_000,
        max_eval_tokens: int = 8_000,
        max_answers: int = 16,
        cache_dir: str | None = None,
    ) -> None:
        """`order`: any order of reference, source and arithmetic; the rest as in `TextStream`."""
        held = Holdout(fraction=0.1)
        super().__init__(
            domains=[
                Domain(name="reference", path="python", holdout=held, max_train_tokens=max_train_tokens),
                Domain(name="source", path="python", holdout=held, max_train_tokens=max_train_tokens),
                Domain(
                    name="arithmetic", path="python", holdout=held, max_train_tokens=max_train_tokens,
                    prompt_field="prompt", exact_match=True,
                ),
            ],
            tokenizer=tokenizer, block_size=block_size, order=order, max_eval_tokens=max_eval_tokens,
            max_answers=max_answers, max_answer_tokens=64, cache_dir=cache_dir,
        )  # fmt: skip

    def _source(self, domain: Domain) -> str:
        content = hashlib.sha256()
        for document in _texts(domain.name):
            content.update(document.prompt.encode() + document.text.encode())
        return f"{domain.name} {content.hexdigest()[:16]} {domain.holdout.fraction}"

    def _documents(self, domain: Domain, split: Part) -> Iterator[Document]:
        return iter(_texts(domain.name))


@cache
def _texts(kind: str) -> tuple[Document, ...]:
    """All documents of one kind: topics of the reference, modules of the library, or 4,000 distinct problems."""
    if kind == "reference":
        from pydoc_data.topics import topics

        return tuple(Document(text=text) for _, text in sorted(topics.items()))
    if kind == "source":
        folder = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(name for name in sys.stdlib_module_names if (folder / f"{name}.py").is_file())
        texts = ((folder / f"{name}.py").read_text(encoding="utf-8") for name in names if not name.startswith("_"))
        return tuple(Document(text=text) for text in texts if 1_000 < len(text) < 60_000)
    return tuple(dict.fromkeys(problems(4_000, seed=0)))
