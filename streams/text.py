"""Streams of text domains: documents, tokenizer, cache, rows, probes."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from clplat.streams.base import EvalSet, Spec, Stream, Task
from clplat.streams.cache_folder import cache_folder, made
from clplat.streams.documents import PARTS, Domain, Part
from clplat.streams.generation_scorers import ExactMatch, Together
from clplat.streams.multiple_choice import MultipleChoice
from clplat.streams.scorers import Likelihood, Scorer
from clplat.streams.token_writer import Target, building_folder, write_caches
from clplat.streams.tokenizers import ByteTokenizer, Tokenizer
from clplat.streams.tokens import FORMAT, Document, TokenCache, TokenData

TOKENIZER_CHARACTERS = 20_000_000
"""What a trained tokenizer reads of each domain; merges of a small vocabulary have settled long before."""


class TextStream(Stream):
    """Language modelling on one text domain after another, from the hub or from local files."""

    source_word = "domain"
    """What errors call a domain: a stream's options may name it otherwise."""

    def __init__(
        self,
        *,
        domains: list[Domain],
        tokenizer: Tokenizer | None = None,
        block_size: int = 256,
        order: list[str] | None = None,
        probes: list[Domain] | None = None,
        multiple_choice: list[MultipleChoice] | None = None,
        max_eval_tokens: int = 20_000,
        max_answers: int = 32,
        max_answer_tokens: int = 128,
        cache_dir: str | None = None,
    ) -> None:
        """`tokenizer` defaults to bytes; `block_size` is the tokens of a row; `order` names domains (default: as
        listed); `probes` are domains of which the test part is scored and nothing trained, `multiple_choice` questions
        (MMLU's) that are scored beside them. Test and validation parts are scored on `max_eval_tokens`, in rows spread
        evenly over the part and the same for every run; exact match on the first `max_answers` questions. Caches lie in
        `cache_dir` (default: $CLPLAT_CACHE, or ~/.cache/clplat)."""
        self.domains, self.probe_domains, self.multiple_choice = domains, probes or [], multiple_choice or []
        self.tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.block_size, self.max_eval_tokens = block_size, max_eval_tokens
        self.max_answers, self.max_answer_tokens = max_answers, max_answer_tokens
        self.cache_dir = cache_folder(cache_dir)
        self.order_names = order or [domain.name for domain in domains]
        self._check()

    def _check(self) -> None:
        if self.max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens: at least 1, got {self.max_answer_tokens}")
        names, word = [domain.name for domain in self.domains], self.source_word
        probes: list[Domain | MultipleChoice] = [*self.probe_domains, *self.multiple_choice]
        every = names + [probe.name for probe in probes]
        if not names or len(set(every)) != len(every):
            raise ValueError(f"{word}s, probes: give at least one {word}, and each its own name; got {every}")
        if unknown := set(self.order_names) - set(names):
            raise ValueError(f"order: there is no {word} {min(unknown)!r}; there are {names}")
        if len(set(self.order_names)) != len(self.order_names):
            raise ValueError(f"order: each {word} can stand there once; got {self.order_names}")
        if not 0 < self.block_size <= self.max_eval_tokens:
            raise ValueError(
                f"block_size: must be positive and at most max_eval_tokens ({self.max_eval_tokens}), "
                f"got {self.block_size}"
            )
        for source in [*self.domains, *probes]:
            source.check()
        for domain in self.domains:
            if "train" not in domain.own_splits():
                raise ValueError(
                    f"domain {domain.name!r}: name a train part in splits or data_files, or make it a probe"
                )

    def prepare(self) -> None:
        made(self.cache_dir)
        self._caches: dict[tuple[str, Part], TokenCache] = {}
        self._sources = {domain.name: self._source(domain) for domain in [*self.domains, *self.probe_domains]}
        source = hashlib.sha256("".join(sorted(self._sources[d.name] for d in self.domains)).encode()).hexdigest()
        self.tokenizer.prepare(self._training_texts(), self.cache_dir, source)
        self.spec = Spec(
            kind="language", input_shape=(self.block_size,), num_outputs=self.tokenizer.vocab_size,
            end_token=self.tokenizer.end_token,
        )  # fmt: skip
        self._lengths = self.tokenizer.token_bytes()
        by_name = {domain.name: domain for domain in self.domains}
        self.tasks = [self._task(index, by_name[name]) for index, name in enumerate(self.order_names)]
        self.probes = [self._test_set(domain, -1) for domain in self.probe_domains]
        self.probes += [asked.eval_set(self.tokenizer, self.spec.input_shape[0]) for asked in self.multiple_choice]

    def _source(self, domain: Domain) -> str:
        """Identity of a domain's documents; a stream with documents of its own overrides this and `_documents`."""
        return domain.source()

    def _documents(self, domain: Domain, split: Part) -> Iterator[Document]:
        return domain.documents(split)

    def _training_texts(self) -> Iterator[str]:
        for domain in sorted(self.domains, key=lambda d: self._sources[d.name]):
            read = 0
            for document in self._documents(domain, "train"):
                if domain.part_of(document) != "train":
                    continue
                if read > TOKENIZER_CHARACTERS:
                    break
                read += len(document.prompt) + len(document.text)
                yield document.prompt + document.text

    def _cache(self, domain: Domain, part: Part) -> TokenCache:
        """The token cache of one part, opened, or made first where it is not there or damaged."""
        if (domain.name, part) not in self._caches:
            target = self._target(domain, part)
            if target.folder.is_dir():
                try:
                    return self._caches.setdefault((domain.name, part), TokenCache(target.folder))
                except ValueError as error:
                    warnings.warn(f"{error} (it is made again now)", stacklevel=2)
                    shutil.rmtree(target.folder, ignore_errors=True)
            self._make_caches(domain, domain.split_of(part), part)
            self._caches[domain.name, part] = TokenCache(target.folder)
        return self._caches[domain.name, part]

    def _make_caches(self, domain: Domain, split: Part, part: Part) -> None:
        """Tokenise a split, with the other parts that are held out from it on the way."""
        trained = domain in self.domains
        parts = [other for other in PARTS if other == part or (trained and domain.split_of(other) == split)]
        targets = {other: self._target(domain, other) for other in parts}
        targets = {other: target for other, target in targets.items() if not target.folder.is_dir()}
        building = building_folder(self.cache_dir / "tokens", f"{domain.name}-{split}", targets)
        place = domain.part_of if split == "train" else lambda _: split
        write_caches(building, targets, self._documents(domain, split), place, self.tokenizer)

    def _target(self, domain: Domain, part: Part) -> Target:
        limit = domain.max_train_tokens if part == "train" else None
        key = f"{FORMAT} {self._sources[domain.name]} {part} {limit} {self.tokenizer.identity}"
        name = f"{domain.name}-{part}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return Target(folder=self.cache_dir / "tokens" / name, max_tokens=limit)

    def _task(self, index: int, domain: Domain) -> Task:
        # Rows of all tasks have the same fields, so that they can stand in one batch and in one buffer.
        marked = any(other.prompt_field is not None for other in self.domains)
        train = TokenData(
            self._cache(domain, "train"), length=self.block_size, task=index, answers=marked,
            answers_only=domain.answers_only,
        )  # fmt: skip
        self._not_empty(train, domain, "train")
        val_data = self._eval_data(domain, "val", index)
        val = EvalSet(name=f"{domain.name}/val", data=val_data, scorer=self._likelihood(domain))
        return Task(
            index=index, name=domain.name, train=train, test=self._test_set(domain, index),
            val=val if len(val_data) else None, budget=domain.budget,
            headline="loss" if domain.prompt_field is None else "answer_loss",
        )  # fmt: skip

    def _test_set(self, domain: Domain, index: int) -> EvalSet:
        data = self._eval_data(domain, "test", index)
        self._not_empty(data, domain, "test")
        scorer: Scorer = self._likelihood(domain)
        if domain.exact_match:
            exact = ExactMatch(
                cache=data.cache, tokenizer=self.tokenizer, marker=domain.answer_marker,
                max_prompt_tokens=max(1, 2 * self.block_size - self.max_answer_tokens),
                max_new_tokens=min(self.max_answer_tokens, 2 * self.block_size - 1), max_examples=self.max_answers,
            )  # fmt: skip
            scorer = Together(scorer, exact)
        return EvalSet(name=domain.name, data=data, scorer=scorer)

    def _likelihood(self, domain: Domain) -> Likelihood:
        return Likelihood(token_bytes=self._lengths, answers=domain.prompt_field is not None)

    def _eval_data(self, domain: Domain, part: Part, index: int) -> TokenData:
        return TokenData(
            self._cache(domain, part), length=self.block_size, task=index, answers=domain.prompt_field is not None,
            max_rows=self.max_eval_tokens // self.block_size,
        )  # fmt: skip

    def _not_empty(self, data: TokenData, domain: Domain, part: Part) -> None:
        if not len(data):
            raise ValueError(
                f"domain {domain.name!r}: its {part} part has {data.cache.documents} documents and "
                f"{len(data.cache.tokens)} tokens, less than one row of block_size {self.block_size} and one token; "
                "give it more documents, a larger holdout.fraction or a smaller block_size"
            )

    def facts(self) -> Mapping[str, Any]:
        """Sizes of every task's sets: training tokens, documents and bytes, tokens and documents kept from training."""
        found: dict[str, Any] = {"vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.identity}
        by_name = {domain.name: domain for domain in self.domains}
        for task in self.tasks:
            train, *held = (self._cache(by_name[task.name], part) for part in PARTS)
            found |= {
                f"{task.name}.train.tokens": len(task.train) * self.block_size,
                f"{task.name}.train.documents": train.documents,
                f"{task.name}.train.bytes": train.bytes,
                f"{task.name}.held_out.tokens": sum(len(cache.tokens) for cache in held),
                f"{task.name}.held_out.documents": sum(cache.documents for cache in held),
            }
        return found
