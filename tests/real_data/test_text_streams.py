"""C4 → Wikipedia → GSM8K on the samples of docs/data.md, as the shipped study describes them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from caches import documents_of

from clplat.components import Component, build, checked
from clplat.streams.batch import IGNORE
from clplat.streams.text import TextStream
from clplat.streams.tokenizers import PretrainedTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stream(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TextStream:
    """The stream of the tiny study, with caches of its own."""
    study = yaml.safe_load((ROOT / "configs" / "c4_wikitext_gsm8k_tiny.yaml").read_text())
    study["stream"]["init_args"]["cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    made = build(checked(Component(**study["stream"]), "stream", "stream"), "stream", "stream")
    made.prepare()
    return made


def test_the_samples_are_those_that_the_documentation_names(data: Path) -> None:
    named = re.findall(r"\| `([\w./]+)` \| ([0-9a-f]{64}) \|", (ROOT / "docs" / "data.md").read_text())
    assert len(named) >= 7
    for name, digest in named:
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == digest, name


def test_every_document_is_in_one_part_and_all_are_there(stream: TextStream) -> None:
    counts = {}
    for domain in stream.domains:
        parts = [documents_of(domain, part) for part in ("train", "val", "test")]
        counts[domain.name] = sum(map(len, parts))
        texts = [{one.prompt + one.text for one in part} for part in parts]
        assert all(texts) and not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert counts == {"c4": 2480, "wikitext": 93, "gsm8k": 7473 + 1319}


def test_gsm8k_keeps_its_official_test_split(stream: TextStream, data: Path) -> None:
    rows = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    cache = stream.tasks[2].test.data.cache
    assert cache.documents == len(rows) == 1319
    for number in (0, 700, 1318):
        prompt, answer = map(stream.tokenizer.decode, cache.document(number))
        assert prompt == f"Question: {rows[number]['question']}\nAnswer: " and answer == rows[number]["answer"]


def test_token_bytes_of_a_whole_set_add_up_to_its_utf8(stream: TextStream) -> None:
    lengths = stream.tokenizer.token_bytes()
    for task in stream.tasks:
        cache = task.train.cache
        assert lengths[torch.from_numpy(cache.tokens.astype("int64"))].double().sum() == cache.bytes


def test_rows_of_all_tasks_are_in_the_vocabulary_and_few_targets_are_ignored(stream: TextStream) -> None:
    for task in stream.tasks:
        batch = task.train.batch(torch.arange(200))
        assert batch.inputs.shape == batch.targets.shape == (200, stream.block_size)
        assert int(batch.inputs.min()) >= 0 and int(batch.inputs.max()) < stream.spec.num_outputs
        assert (batch.targets == IGNORE).float().mean() < 0.02
    marked = stream.tasks[2].train.batch(torch.arange(200)).answer
    assert marked is not None and 0.4 < marked.float().mean() < 0.8


def test_wikitext_lines_become_62_articles_of_the_probe(stream: TextStream) -> None:
    (probe,) = stream.probes
    assert probe.name == "wikitext2"
    titles = [stream.tokenizer.decode(probe.data.cache.document(number)[1]).strip()[:2] for number in range(62)]
    assert len(probe.data.cache.prompts) == 62 and set(titles) == {"= "}


def test_exact_match_reads_gsm8k_answers(stream: TextStream) -> None:
    exact = stream.tasks[2].test.scorer.scorers[1]
    answers = [exact.final(exact.cache.document(number)[1]) for number in exact.examples.tolist()]
    assert len(answers) == stream.max_answers and all(re.fullmatch(r"-?[\d,.]+", answer) for answer in answers)


def test_a_pretrained_tokenizer_with_byte_fallback_serves_the_same_stream(
    data: Path, stream: TextStream, tmp_path: Path
) -> None:
    wikitext = next(domain for domain in stream.domains if domain.name == "wikitext")
    other = TextStream(
        domains=[wikitext], tokenizer=PretrainedTokenizer(name=str(data / "stories260k")), block_size=64,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    other.prepare()
    cache = other.tasks[0].train.cache
    lengths = other.tokenizer.token_bytes()[torch.from_numpy(cache.tokens.astype("int64"))].double().sum()
    # This tokenizer puts one space before each document.
    assert lengths == cache.bytes + len(cache.prompts)
    assert other.spec.num_outputs == 512
