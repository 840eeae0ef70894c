"""A real pretrained Llama of 260,000 weights reads real books and dialogues, as the shipped toy studies have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from interruptions import assert_resumes_as_if_never_stopped

from clplat.api import load_model
from clplat.architectures.adapters import backbone_checksum
from clplat.architectures.locas import LocasModel, dense, export
from clplat.architectures.locas.options import SideMemory
from clplat.architectures.pretrained.model import Pretrained
from clplat.streams.base import Spec
from clplat.streams.batch import Batch
from clplat.streams.book import Book, BookStream
from clplat.streams.tokenizers import PretrainedTokenizer

ROOT = Path(__file__).parents[2]
SPEC = Spec(kind="language", input_shape=(128,), num_outputs=512, end_token=2)
CHECKSUM = "5892a0e030c69eb7aa54c4b9b0ea531cf679fbbb480163b9856b4e2259fa1e8d"


def chunks(data: Path, cache: Path, count: int = 9) -> list[Batch]:
    """The first chunks of Alice."""
    stream = BookStream(
        books=[Book(name="alice", file=str(data / "books" / "alice_s_adventures_in_wonderland.txt"), max_tokens=600)],
        tokenizer=PretrainedTokenizer(name=str(data / "stories260k")), chunk=64, window=128, passes=1, parts=1,
        cache_dir=str(cache),
    )  # fmt: skip
    stream.prepare()
    return [stream.tasks[0].train.batch(torch.tensor([number])) for number in range(count)]


def host(data: Path, **memory: Any) -> LocasModel:
    torch.manual_seed(0)
    return LocasModel(
        spec=SPEC, model=lambda spec: Pretrained(spec=spec, name=str(data / "stories260k")),
        memory=SideMemory(**{"rank": 16} | memory),
    )  # fmt: skip


def nats(model: Any, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch).logits.flatten(0, 1), batch.targets.flatten())


def read(model: LocasModel, batches: list[Batch]) -> LocasModel:
    """Two steps a chunk, in the shipped study's way."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.begin_memory("default", batches[0], torch.Generator().manual_seed(0))
    for batch in batches:
        for _ in range(2):
            optimizer.zero_grad()
            nats(model, batch).backward()
            optimizer.step()
            model.step_end(None)  # type: ignore[arg-type]
    return model


def test_reading_teaches_the_memory_alone_and_what_it_holds_can_be_taken_away_or_joined(
    data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    batches = chunks(data, tmp_path)
    plain, model = Pretrained(spec=SPEC, name=str(data / "stories260k")), host(data)
    with torch.no_grad():
        before = [plain(batch).logits for batch in batches]
        model.begin_memory("default", batches[0], torch.Generator())
        assert all(torch.equal(model(batch).logits, was) for batch, was in zip(batches, before))
    losses = [float(nats(plain, batch).detach()) for batch in batches]
    read(model, batches[:6])
    after = [float(nats(model, batch).detach()) for batch in batches]
    assert sum(after[6:]) < sum(losses[6:]), "what was read tells of what comes"
    rows = torch.cat([p.detach().norm(dim=1) for p in model.adapter_parameters("default").values()])
    assert float(rows.max()) <= 1 + 1e-6
    assert backbone_checksum(model.backbone) == model.checksum and model.facts()["backbone_sha256"] == CHECKSUM
    with torch.no_grad(), model.answering():
        assert all(torch.equal(model(batch).logits, was) for batch, was in zip(batches, before))
    with torch.no_grad():
        for read_again in (dense(model), AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "plain"))):
            found = read_again(batches[3] if isinstance(read_again, Pretrained) else batches[3].inputs).logits
            expected, answered = model(batches[3]).logits, batches[3].targets[0] >= 0
            # Logits of this model go beyond 20, where one step of float32 is 2e-6.
            apart = (found - expected)[:, answered].abs().max() / expected[:, answered].abs().max()
            assert float(apart) <= 1e-5
        wide = model.double()
        assert float((dense(wide)(batches[3]).logits - wide(batches[3]).logits).abs().max()) < 1e-12


def shipped(data: Path, tmp_path: Path, patch: pytest.MonkeyPatch, name: str, variant: str) -> dict[str, Any]:
    """A shipped toy study with one of its variants, smaller still."""
    patch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    study = yaml.safe_load((ROOT / "configs" / "pretrained" / f"{name}.yaml").read_text())
    options = study["stream"]["init_args"]
    del options["multiple_choice"]
    if name == "book_tiny":
        options["books"][0]["max_tokens"] = 520
        options |= {"parts": 2}
    else:
        options |= {
            "dialogues": ["conv-26"],
            "max_turns": 10,
            "max_questions": 6,
            "max_answers": 2,
            "max_new_tokens": 4,
        }
    study["evaluation"] = {"batch_size": 16, "max_rows": 2}
    study["checkpoint"] = {"every_seconds": 0}
    study["tracking"] = {"enabled": False, "log_every": 2, "system_metrics": False}
    return study | {"variants": {variant: study["variants"][variant]}, "seeds": [0], "baseline": None}


@pytest.mark.parametrize("name", ["book_tiny", "dialogue_tiny"])
def test_a_shipped_study_resumes_in_the_middle_of_a_text_as_if_never_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert_resumes_as_if_never_stopped(shipped(data, tmp_path, monkeypatch, name, "locas"), step=4, folder=tmp_path)
    model = load_model(next((tmp_path / "whole").rglob("config.yaml")).parent)
    assert model.facts()["backbone_sha256"] == CHECKSUM
    assert not any("weight" in key and "lora" not in key for key in model.state_dict())
