"""Soft prompts before a pretrained model: they hold the contract, stay apart, and choose by what has been read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import CONTEXT, END, VOCABULARY, model_folder

from clplat.architectures.base import Prompts
from clplat.architectures.contract import CHECKS
from clplat.architectures.generation import greedy
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.pretrained.prompted import Prompted
from clplat.architectures.probing import Contract
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

SPEC = Spec(kind="language", input_shape=(12,), num_outputs=VOCABULARY, end_token=END)
POOL: dict[str, Any] = {"size": 2, "length": 3, "top_k": 2, "query_tokens": 4, "matching": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), "llama")


def bare(folder: Path, **options: Any) -> Prompted:
    torch.manual_seed(0)
    return Prompted(spec=SPEC, name=str(folder), **options)


def named(folder: Path, **options: Any) -> Prompted:
    model = bare(folder, **options)
    model.add_prompt("old", 2)
    model.add_prompt("new", 3)
    model.use_prompts(["new", "old"], ["new"])
    return model


def pooled(folder: Path, **changes: Any) -> Prompted:
    model = bare(folder)
    model.add_pool(**POOL | changes)
    return model


KINDS = {
    "named": named, "pool": pooled,
    "pool of one token": lambda folder: pooled(folder, query_tokens=1),
}  # fmt: skip


def rows(count: int = 3, seed: int = 1) -> Batch:
    tokens = torch.randint(3, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(inputs=tokens, targets=tokens.clone())


# A few vectors alone cannot make a frozen model of random weights know random rows by heart.
@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c.__name__ != "learns_one_batch_by_heart"], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_contract(folder: Path, kind: str, check: Any) -> None:
    check(Contract(factory=lambda _: KINDS[kind](folder), spec=SPEC, isolates_documents=False))


def test_without_prompts_it_answers_as_the_backbone_bit_for_bit_and_with_them_otherwise(folder: Path) -> None:
    plain, model = Pretrained(spec=SPEC, name=str(folder)).eval(), bare(folder).eval()
    model.add_prompt("one", 2)
    assert isinstance(model, Prompts)
    with torch.no_grad():
        assert torch.equal(model(rows()).logits, plain(rows()).logits)
        assert greedy(model, [[5, 6]], max_new_tokens=4, stop=None) == greedy(
            plain, [[5, 6]], max_new_tokens=4, stop=None
        )
        model.use_prompts(["one"])
        assert (model(rows()).logits - plain(rows()).logits).abs().max() > 0.01


def test_a_prompt_of_embeddings_is_read_like_its_tokens(folder: Path) -> None:
    model, batch = bare(folder).eval(), rows()
    tokens = torch.tensor([7, 9])
    model.add_prompt("words", 2)
    model.prompts["words"].data.copy_(model.backbone.get_input_embeddings()(tokens))
    model.use_prompts(["words"])
    longer = torch.cat([tokens.expand(len(batch), -1), batch.inputs], dim=1)
    with torch.no_grad():
        expected = model.backbone(input_ids=longer, use_cache=False).logits[:, 2:]
        torch.testing.assert_close(model(batch).logits, expected)


def test_earlier_prompts_and_the_backbone_keep_every_bit_while_a_new_one_learns(folder: Path) -> None:
    model = named(folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    F.cross_entropy(model(rows()).logits.flatten(0, 1), rows().targets.flatten()).backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"prompts.new"}


def test_the_state_holds_prompts_and_the_checksum_alone(folder: Path) -> None:
    assert set(named(folder).state_dict()) == {"prompts.old", "prompts.new", "backbone_sha256"}
    assert set(pooled(folder).state_dict()) == {"pool.prompt", "pool.key", "backbone_sha256"}


def test_a_text_is_shown_the_prompts_whose_keys_are_nearest_to_its_first_tokens(folder: Path) -> None:
    model, batch = pooled(folder, size=5, query_tokens=3), rows(4)
    first = model.backbone.get_input_embeddings()(batch.inputs[:, :3]).mean(1)
    near = F.cosine_similarity(first.unsqueeze(1), model.pool["key"].unsqueeze(0), dim=-1)
    prefix, losses = model._prefix(batch.inputs[:, :3])
    expected, gaps = [], []
    for row in near.detach():
        order = sorted(range(5), key=lambda number: -float(row[number]))[:2]
        expected.append(torch.cat([model.pool["prompt"][number] for number in order]))
        gaps.append(sum(1 - float(row[number]) for number in order))
    assert torch.equal(prefix, torch.stack(expected))
    assert float(losses["prompt_matching"].detach()) == pytest.approx(0.5 * sum(gaps) / 4, rel=1e-5)


def test_what_follows_the_first_tokens_chooses_nothing_and_the_first_ones_see_no_prompt(folder: Path) -> None:
    model, plain, batch = pooled(folder, size=6).eval(), Pretrained(spec=SPEC, name=str(folder)).eval(), rows(4)
    with torch.no_grad():
        shown, bare_logits = model(batch).logits, plain(batch).logits
    # Positions behind prompts are shifted, which a rotary model does not notice.
    torch.testing.assert_close(shown[:, :3], bare_logits[:, :3], rtol=1e-4, atol=1e-4)
    assert (shown[:, 3:] - bare_logits[:, 3:]).abs().amax((1, 2)).min() > 0.001


def test_answers_behind_prompts_are_those_of_reading_everything_again(folder: Path) -> None:
    prompts = [[5, 6, 7, 8, 9], [11], [4, 3, 9]]
    for model in (named(folder).eval().double(), pooled(folder, size=6).eval().double()):
        written = greedy(model, prompts, max_new_tokens=5, stop=None)
        for prompt, answer in zip(prompts, written, strict=True):
            so_far = list(prompt)
            for token in answer:
                tokens = torch.tensor([so_far])
                assert int(model(Batch(inputs=tokens, targets=tokens)).logits[0, -1].argmax()) == token
                so_far.append(token)


def test_the_eager_attention_gives_the_same_answers(folder: Path) -> None:
    # In float32: its softmax is computed there in any case.
    usual, eager = named(folder).eval(), named(folder, attention="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(eager(rows()).logits, usual(rows()).logits)
    prompts = [[5, 6, 7], [9]]
    assert greedy(eager, prompts, max_new_tokens=3, stop=None) == greedy(usual, prompts, max_new_tokens=3, stop=None)


def test_wrong_prompts_are_refused(folder: Path) -> None:
    model = named(folder)
    for action, message in (
        (lambda: model.add_prompt("new", 2), "'new' of 2 vectors: give a new name"),
        (lambda: model.add_prompt("a b", 2), "'a b' of 2 vectors: give a new name"),
        (lambda: model.use_prompts(["other"]), "'other': there is none of that name; there are .'old', 'new'."),
        (lambda: model.use_prompts(["old"], ["new"]), "trained, but not shown"),
        (lambda: model.add_pool(**POOL), "a pool stands alone"),
        (lambda: bare(folder).add_pool(**POOL | {"top_k": 3}), "3 prompts cannot be chosen from 2"),
        (lambda: bare(folder).add_pool(**POOL | {"query_tokens": 13}), "rows have 12 tokens, fewer than 13"),
        (lambda: bare(folder).add_pool(**POOL | {"length": CONTEXT}), "do not fit the context"),
        (lambda: model(rows().replaced(segment_ids=torch.arange(12).expand(3, -1))), "holds several documents"),
    ):
        with pytest.raises(ValueError, match=message):
            action()
    model.add_prompt("long", 30)
    with pytest.raises(ValueError, match="do not fit the context"):
        model.use_prompts(["long"])
