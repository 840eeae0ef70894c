"""Streams of text domains: documents, tokenizer, cache, rows, probes."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.streams.base import EvalSet, Spec, Stream, Task
from clplat.streams.documents import Domain, Part
from clplat.streams.generation_scorers import ExactMatch, Together
from clplat.streams.scorers import Likelihood, Scorer
from clplat.streams.tokenizers import ByteTokenizer, Tokenizer
from clplat.streams.tokens import FORMAT, Document, TokenCache, TokenData, write_cache


class TextStream(Stream):
    """Language modelling on one text domain after another, from the hub or from local files."""

    def __init__(
        self,
        *,
        domains: list[Domain],
        tokenizer: Tokenizer | None = None,
        block_size: int = 256,
        order: list[str] | None = None,
        probes: list[Domain] | None = None,
        max_eval_tokens: int = 20_000,
        max_answers: int = 32,
        max_answer_tokens: int = 128,
        cache_dir: str | None = None,
    ) -> None:
        """`tokenizer` defaults to bytes; `block_size` is the tokens of a row; `order` names domains (default: as
        listed); `probes` are domains of which the test part is scored and nothing trained. A task is scored on the
        first `max_eval_tokens` of its test part, the same for every run; exact match on its first `max_answers`
        questions. Token caches lie in `cache_dir` (default: $CLPLAT_CACHE, or ~/.cache/clplat)."""
        self.domains, self.probe_domains = domains, probes or []
        self.tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.block_size, self.max_eval_tokens = block_size, max_eval_tokens
        self.max_answers, self.max_answer_tokens = max_answers, max_answer_tokens
        default = os.environ.get("CLPLAT_CACHE", str(Path.home() / ".cache" / "clplat"))
        self.cache_dir = Path(cache_dir or default)
        names = [domain.name for domain in domains]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"domains: give at least one, each with its own name; got {names}")
        if order is not None and (unknown := set(order) - set(names)):
            raise ValueError(f"order: there is no domain {sorted(unknown)[0]!r}; there are {names}")
        self.order_names = order or names
        for domain in [*domains, *self.probe_domains]:
            domain.check()

    def prepare(self) -> None:
        by_name = {domain.name: domain for domain in self.domains}
        source = hashlib.sha256("".join(sorted(self._source(d) for d in self.domains)).encode()).hexdigest()[:16]
        self.tokenizer.train(self._training_texts(), self.cache_dir, source)
        self.spec = Spec(
            kind="language", input_shape=(self.block_size,), num_outputs=self.tokenizer.vocab_size,
            end_token=self.tokenizer.end_token,
        )  # fmt: skip
        self._lengths = self.tokenizer.token_bytes()
        self.tasks = [self._task(index, by_name[name]) for index, name in enumerate(self.order_names)]
        self.probes = [self._eval_set(domain, "test", -1) for domain in self.probe_domains]

    def _source(self, domain: Domain) -> str:
        return domain.source()

    def _documents(self, domain: Domain, part: Part) -> Iterator[Document]:
        return domain.documents(part)

    def _training_texts(self) -> Iterator[str]:
        for domain in sorted(self.domains, key=lambda d: d.name):
            yield from (one.prompt + one.text for one in self._documents(domain, "train"))

    def _cache(self, domain: Domain, part: Part) -> TokenCache:
        """The token cache of one part, made if it is not there, made again with a warning if it is damaged."""
        limit = domain.max_train_tokens if part == "train" else None
        key = f"{FORMAT} {self._source(domain)} {part} {limit} {self.tokenizer.identity}"
        folder = self.cache_dir / "tokens" / f"{domain.name}-{part}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if folder.is_dir():
            try:
                return TokenCache(folder)
            except ValueError as error:
                warnings.warn(f"{error}; it is made again", stacklevel=2)
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_cache(folder, self._documents(domain, part), self.tokenizer, max_tokens=limit)
        return TokenCache(folder)

    def _task(self, index: int, domain: Domain) -> Task:
        answers = domain.prompt_field is not None
        # Rows of all tasks have the same fields, so that they can stand in one batch and in one buffer.
        marked = any(other.prompt_field is not None for other in self.domains)
        train = TokenData(
            self._cache(domain, "train"), length=self.block_size, task=index, answers=marked,
            answers_only=domain.answers_only,
        )  # fmt: skip
        val = self._eval_set(domain, "val", index)
        return Task(
            index=index, name=domain.name, train=train, test=self._eval_set(domain, "test", index),
            val=val if len(val.data) else None, headline="answer_loss" if answers else "loss", budget=domain.budget,
        )  # fmt: skip

    def _eval_set(self, domain: Domain, part: Part, index: int) -> EvalSet:
        cache, answers = self._cache(domain, part), domain.prompt_field is not None
        data = TokenData(
            cache, length=self.block_size, task=index, answers=answers,
            max_rows=max(1, self.max_eval_tokens // self.block_size),
        )  # fmt: skip
        scorer: Scorer = Likelihood(token_bytes=self._lengths, answers=answers)
        if domain.exact_match and part == "test":
            exact = ExactMatch(
                cache=cache, tokenizer=self.tokenizer, marker=domain.answer_marker,
                max_prompt_tokens=max(1, 2 * self.block_size - self.max_answer_tokens),
                max_new_tokens=min(self.max_answer_tokens, 2 * self.block_size - 1), max_examples=self.max_answers,
            )  # fmt: skip
            scorer = Together(scorer, exact)
        return EvalSet(name=domain.name, data=data, scorer=scorer)

    def facts(self) -> Mapping[str, Any]:
        """Tokens and documents of every task's training and test sets."""
        found: dict[str, Any] = {"vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.identity}
        sets: Sequence[tuple[str, Any]] = [
            pair
            for task in self.tasks
            for pair in ((f"{task.name}.train", task.train), (f"{task.name}.test", task.test.data))
        ]
        for name, data in sets:
            found[f"{name}.tokens"] = len(data) * self.block_size
            found[f"{name}.documents"] = len(data.cache.prompts)
        return found
