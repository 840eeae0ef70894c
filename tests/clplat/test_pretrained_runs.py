"""Runs of pretrained models with adapters: resumed as if never stopped, saved without the backbone, refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from small_models import model_folder
from studies import DIGITS, run_folder

from clplat.api import load_model
from clplat.architectures.adapters import backbone_checksum
from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.config import load_run
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import read, table
from clplat.strategies.world import World

BYTES = 257


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of two question-answer tasks, and one of a model that reads bytes."""
    root = tmp_path_factory.mktemp("tasks")
    for name, sign in (("plus", "+"), ("minus", "-")):
        (root / name).mkdir()
        rows = [{"prompt": f"{a}{sign}{b}=", "answer": str(a + b if sign == "+" else a - b)} for a in range(9)
                for b in range(9)]  # fmt: skip
        for part, chosen in (("train", rows[::2]), ("eval", rows[1::4]), ("test", rows[3::4])):
            (root / name / f"{part}.json").write_text(json.dumps(chosen))
    return root, model_folder(tmp_path_factory.mktemp("models"), "llama", vocab_size=BYTES, eos_token_id=BYTES - 1)


def run_of(places: tuple[Path, Path], cache: Path, **changes: Any) -> dict[str, Any]:
    root, model = places
    tasks = [{"name": name, "metric": "number", "max_new_tokens": 3} for name in ("plus", "minus")]
    return {
        "name": "adapters",
        "stream": {
            "class_path": "PromptAnswerStream",
            "init_args": {
                "root": str(root), "tasks": tasks, "max_tokens": 16, "max_answer_tokens": 4, "max_answers": 4,
                "max_eval_rows": 8, "cache_dir": str(cache),
            },
        },
        "architecture": {
            "class_path": "Pretrained",
            "init_args": {"name": str(model), "lora": {"rank": 4, "dropout": 0.1}},
        },
        "training": {
            "budget": {"steps": 6}, "batch_size": 8, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}}
        },
        "checkpoint": DIGITS["checkpoint"], "tracking": DIGITS["tracking"],
    } | changes  # fmt: skip


STRATEGIES: dict[str, dict[str, Any]] = {
    "replay and penalty": {
        "replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 12}},
        "ewc": {"class_path": "OnlineEWC", "init_args": {"strength": 5.0, "fisher_samples": 4, "fisher_batch_size": 1}},
    },
    "an adapter for each task": {"own": {"class_path": "adapter_strategies.OneForEachTask"}},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stopped_run_with_adapters_goes_on_as_if_it_had_not_been(
    places: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    data = run_of(places, tmp_path / "cache", strategies=STRATEGIES[name])
    assert_resumes_as_if_never_stopped(data, step=9, folder=tmp_path)


def test_importances_of_adapters_are_the_same_from_several_rows_at_once_and_from_one_at_a_time(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    found = []
    for rows in (1, 4):
        options = {"strength": 0.0001, "fisher_samples": None, "fisher_batch_size": rows, "labels": "observed"}
        ewc = {"ewc": {"class_path": "OnlineEWC", "init_args": options}}
        folder = run_folder(tmp_path, run_of(places, tmp_path / "cache", strategies=ewc), f"of{rows}")
        assert execute(folder).status == "FINISHED"
        state = Checkpoints(folder, every_seconds=0).load()
        assert state is not None
        found.append(state["strategies"]["ewc"]["state"]["importance"])
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-6 * float(found[0].max()))


def test_a_run_saves_adapters_alone_leaves_the_backbone_as_it_was_and_says_what_it_was(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    strategies = STRATEGIES["an adapter for each task"]
    folder = run_folder(tmp_path, run_of(places, tmp_path / "cache", strategies=strategies))
    assert execute(folder).status == "FINISHED"
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None
    assert state["structure"] == {"adapters": ["default", "task0", "task1"], "active": ["task1"], "trained": ["task1"]}
    assert all("lora" in name or name == "backbone_sha256" for name in state["architecture"])
    model = load_model(folder)
    assert backbone_checksum(model.backbone) == model.checksum
    first, second = (model.adapter_parameters(name) for name in ("task0", "task1"))
    assert all(first[name].any() and not torch.equal(first[name], second[name]) for name in first)
    tags = {name: value for entry in read(folder) if entry["kind"] == "tags" for name, value in entry["values"].items()}
    assert tags["architecture.backbone_sha256"] == model.checksum and tags["architecture.weights"] == "float32"
    found = table(folder)
    assert {cell.metric for cell in found.cells(2)} == {"loss", "bits_per_byte", "accuracy"}
    assert found.scores()[1][0] != found.scores()[0][0]


def test_a_model_that_changed_since_the_run_began_is_refused_when_it_is_resumed(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    model = model_folder(tmp_path, "llama", vocab_size=BYTES, eos_token_id=BYTES - 1)
    folder = run_folder(tmp_path, run_of((places[0], model), tmp_path / "cache"))
    execute(folder)
    model_folder(tmp_path, "llama", vocab_size=BYTES, eos_token_id=BYTES - 1, initializer_range=0.2)
    with pytest.raises(ValueError, match="these adapters were trained beside another backbone"):
        load_model(folder)
    outcome = execute(folder)
    assert outcome.status == "FAILED" and "these adapters were trained beside another backbone" in outcome.reason


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "/nowhere", "architecture: name: there is no folder /nowhere"),
        ("lora", {"targets": ["query"]}, "architecture: lora.targets: no layer of LlamaForCausalLM is called 'query'"),
        ("lora", {"rank": 0}, "architecture.init_args.*lora.rank: must be at least 1"),
    ],
)
def test_a_wrong_option_is_a_configuration_error(
    places: tuple[Path, Path], tmp_path: Path, key: str, value: Any, message: str
) -> None:
    data = run_of(places, tmp_path / "cache")
    data["architecture"]["init_args"][key] = value
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        assemble(load_run(run_folder(tmp_path, data) / "config.yaml"), World())


def test_rows_beyond_the_context_of_the_model_are_a_configuration_error(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    data = run_of(places, tmp_path / "cache")
    data["stream"]["init_args"] |= {"prompt_template": "x" * 60 + "{prompt}", "max_tokens": 64}
    with pytest.raises(ConfigError, match="do not fit the context of .*, 32 tokens; lower the stream's"):
        assemble(load_run(run_folder(tmp_path, data) / "config.yaml"), World())


def test_a_model_of_ours_is_adapted_in_a_study(places: tuple[Path, Path], tmp_path: Path) -> None:
    ours = {"class_path": "Transformer", "init_args": {"hidden_size": 32, "num_layers": 1}}
    data = run_of(places, tmp_path / "cache", architecture={"class_path": "Adapted", "init_args": {"model": ours}})
    assert execute(run_folder(tmp_path, data)).status == "FINISHED"
