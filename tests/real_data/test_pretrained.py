"""A real pretrained Llama of 260,000 weights and real questions, as the shipped toy study uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from interruptions import assert_resumes_as_if_never_stopped

from clplat.api import load_model
from clplat.api import run as clplat_run
from clplat.architectures.adapters import backbone_checksum
from clplat.architectures.contract import CHECKS, learns_one_batch_by_heart
from clplat.architectures.generation import greedy
from clplat.architectures.lora import LoRA
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.probing import Contract
from clplat.assembly import prepared_stream
from clplat.config import load_run
from clplat.connectivity.analysis import analyze
from clplat.journal import read, table
from clplat.metrics import summary
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.tokenizers import PretrainedTokenizer

ROOT = Path(__file__).parents[2]
SPEC = Spec(kind="language", input_shape=(12,), num_outputs=512, end_token=2)
CHECKSUM = "5892a0e030c69eb7aa54c4b9b0ea531cf679fbbb480163b9856b4e2259fa1e8d"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "adapters": {"lora": LoRA(rank=32, alpha=64, targets=LINEAR)}}


def stories(data: Path, **options: Any) -> Pretrained:
    return Pretrained(spec=SPEC, name=str(data / "stories260k"), **options)


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainedTokenizer:
    made = PretrainedTokenizer(name=str(data / "stories260k"))
    made.prepare([], tmp_path_factory.mktemp("cache"), "")
    return made


# Random tokens are out of reach of low-rank changes to so small a model; sentences are not: see below.
@pytest.mark.parametrize(
    ("kind", "check"),
    [(kind, check) for kind in KINDS for check in CHECKS if (kind, check) != ("adapters", learns_one_batch_by_heart)],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_the_llama_holds_the_contract(data: Path, kind: str, check: Any) -> None:
    made = Contract(factory=lambda _: stories(data, **KINDS[kind]), spec=SPEC, gradient_steps=3, overfit_steps=300)
    check(made)


def test_it_knows_its_stories_and_goes_on_telling_one(data: Path, tokenizer: PretrainedTokenizer) -> None:
    model, text = (
        stories(data).eval(),
        "Once upon a time, there was a little girl named Lily. She loved to play outside",
    )
    assert tokenizer.begin_token == 1 and tokenizer.end_token == 2
    ids = torch.tensor([[1, *tokenizer.encode([text])[0]]])
    with torch.no_grad():
        nats = F.cross_entropy(model(Batch(inputs=ids[:, :-1], targets=ids[:, 1:])).logits[0], ids[0, 1:])
    assert float(nats) < 1.2
    told = tokenizer.decode(greedy(model, [ids[0].tolist()], max_new_tokens=24, stop=2)[0])
    assert "park" in told or "outside" in told or "She" in told, told


def test_adapters_learn_four_sentences_by_heart(data: Path, tokenizer: PretrainedTokenizer) -> None:
    texts = ["Ada pays 12 euros and gets 3 back at once", "Inflation expectations fell a bit in March",
             "Which of these is a compound sentence here?", "The federal funds rate remained stable again"]  # fmt: skip
    ids = torch.tensor([tokens[:16] for tokens in tokenizer.encode(texts)])
    torch.manual_seed(0)
    model, losses = stories(data, lora=LoRA(rank=32, alpha=64, dropout=0.0, targets=LINEAR)), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        output = model(Batch(inputs=ids[:, :-1], targets=ids[:, 1:]))
        loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_training_adapters_leaves_every_bit_of_the_backbone(data: Path) -> None:
    model = stories(data, lora=LoRA(targets=LINEAR))
    assert model.checksum == CHECKSUM
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(512, (4, 12), generator=torch.Generator().manual_seed(0))
    plain = stories(data)(Batch(inputs=tokens, targets=tokens)).logits
    assert torch.equal(model.eval()(Batch(inputs=tokens, targets=tokens)).logits, plain)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(
            model.train()(Batch(inputs=tokens, targets=tokens)).logits.flatten(0, 1), tokens.flatten()
        ).backward()
        optimizer.step()
    assert backbone_checksum(model.backbone) == CHECKSUM
    assert not torch.equal(model.eval()(Batch(inputs=tokens, targets=tokens)).logits, plain)


def shipped(data: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The toy study's first two tasks, smaller still."""
    patch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    study = yaml.safe_load((ROOT / "configs" / "pretrained" / "tiny.yaml").read_text())
    options = study["stream"]["init_args"]
    options |= {"tasks": options["tasks"][:2], "max_answers": 4, "max_eval_rows": 8, "max_tokens": 96}
    options["multiple_choice"][0]["max_questions"] = 4
    study["training"] |= {"budget": {"steps": 4}, "batch_size": 8}
    study["checkpoint"] = {"every_seconds": 0}
    study["tracking"] = {"enabled": False, "log_every": 2, "system_metrics": False}
    return study | {"variants": {"er": study["variants"]["er"]}, "seeds": [0], "baseline": None}


def test_the_toy_study_resumes_as_if_never_stopped_and_keeps_the_backbone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes_as_if_never_stopped(shipped(data, tmp_path, monkeypatch), step=6, folder=tmp_path)
    run = next((tmp_path / "whole").glob("*/config.yaml")).parent
    model = load_model(run)
    assert backbone_checksum(model.backbone) == CHECKSUM
    assert sum(value.numel() for value in model.state_dict().values()) < 40_000


def test_the_study_of_trace_measures_what_it_is_for_and_its_weights_can_be_walked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but for sizes, on the toy model in the place of SmolLM2."""
    monkeypatch.setenv("CLPLAT_SMOLLM2", str(data / "stories260k"))
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    study = yaml.safe_load((ROOT / "configs" / "pretrained" / "trace.yaml").read_text())
    options = study["stream"]["init_args"] | {"max_tokens": 96, "max_answer_tokens": 16, "max_eval_rows": 3}
    options["tasks"] = [
        t | {"max_new_tokens": min(8, t["max_new_tokens"]), "max_examples": 16} for t in options["tasks"]
    ]
    options["probes"][0] |= {"max_new_tokens": 8, "max_examples": 10}
    options["multiple_choice"][0] |= {"max_questions": 8}
    study["stream"]["init_args"] = options | {"max_answers": 2}
    study["tracking"] = {"enabled": False, "system_metrics": False}
    study |= {"variants": {"seq": {}}, "seeds": [0]}
    run = clplat_run(study, quiet=True).folder / "seq-s0"
    found = table(run)
    assert found.tasks() == ["C-STANCE", "FOMC", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
    numbers = summary(found)
    assert {"final_score", "answers/final_score", "answers/backward_transfer_trace", "ability_delta"} <= set(numbers)
    written = found.matrix("edit_similarity")[:, 2]
    assert np.isfinite(written[[0, 3, 4, 5, 6, 7]]).all() and np.isnan(written[[1, 2]]).all()
    assert {(c.task, c.metric) for c in found.cells(7) if c.index is None} >= {("MeetingBank", "rouge_l"),
                                                                               ("mmlu", "accuracy")}  # fmt: skip
    costs = [entry["values"] for entry in read(run) if entry["kind"] == "metric" and "cost/steps" in entry["values"]]
    assert costs[-1]["cost/steps"] == 5 + 3 + 5 + 3 + 5 + 5 + 7
    walks = analyze(run, points=3, gap=1, rows=2)
    assert [w.space for w in walks] == ["weights"] * 6 + ["products"] * 6
    assert set(walks[0].losses) == {"earlier", "later", "seen", "general"}


def test_rows_of_trace_end_in_their_answer_and_their_end_token(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies import run_folder

    folder = run_folder(tmp_path, shipped(data, tmp_path, monkeypatch))
    stream = prepared_stream(load_run(folder / "config.yaml"))
    assert stream.facts()["FOMC.train.prompts_cut"] > 0
    for task in stream.tasks:
        batch = task.train.batch(torch.arange(20))
        assert bool((batch.inputs[:, 0] == 1).all())
        for number, targets in enumerate(batch.targets.tolist()):
            prompt, answer = task.train.cache.document(number)
            assert [token for token in targets if token != IGNORE] == [*answer, 2][:16]
            shown = batch.inputs[number, 1 : targets.index((*answer, 2)[0]) + 1].tolist()
            assert shown == prompt[-len(shown) :]
    mmlu = stream.probes[0]
    assert mmlu.name == "mmlu" and len(mmlu.data) == 4
