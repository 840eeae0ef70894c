"""Runs of pretrained models with adapters: resumed as if never stopped, saved without the backbone, refused early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interruptions import assert_resumes_as_if_never_stopped
from question_runs import BYTES, run_of
from small_models import model_folder
from studies import run_folder

from clplat.api import load_model
from clplat.architectures.adapters import backbone_checksum
from clplat.assembly import assemble
from clplat.checkpoint import Checkpoints
from clplat.cli import main
from clplat.config import load_run
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import read, table
from clplat.strategies.world import World

STRATEGIES: dict[str, dict[str, Any]] = {
    "replay and penalty": {
        "replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 12}},
        "ewc": {"class_path": "OnlineEWC", "init_args": {"strength": 5.0, "fisher_samples": 4, "fisher_batch_size": 1}},
    },
    "an adapter for each task": {"own": {"class_path": "adapter_strategies.OneForEachTask"}},
    "slow weights": {"ilora": {"class_path": "ILoRA", "init_args": {"capacity": 12, "arm": "code_intent"}}},
    "orthogonal adapters": {"olora": {"class_path": "OLoRA", "init_args": {"norm": 0.1}}},
    "task identity": {"one": {"class_path": "AdapterPerTask"}},
    "held to what it was": {"olora": {"class_path": "OLoRA"}, "lwf": {"class_path": "LwF"}},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stopped_run_with_adapters_goes_on_as_if_it_had_not_been(
    places: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    data = run_of(places, tmp_path / "cache", strategies=STRATEGIES[name])
    assert_resumes_as_if_never_stopped(data, step=9, folder=tmp_path)


def scores_of(folder: Path, view: str = "default", metric: str = "loss") -> list[list[float]]:
    """One metric of every task, a list for each row, through one view."""
    cells = [table(folder).cells(row) for row in range(3)]
    return [[c.value for c in row if (c.view, c.metric) == (view, metric) and c.index is not None] for row in cells]


def finished(places: tuple[Path, Path], parent: Path, name: str, strategies: dict[str, Any], **changes: Any) -> Path:
    data = run_of(places, parent / "cache", strategies=strategies)
    data["training"] |= changes
    folder = run_folder(parent, data, name)
    outcome = execute(folder)
    assert outcome.status == "FINISHED", outcome.reason
    return folder


def test_fast_weights_without_consistency_are_those_of_replay_in_a_run_and_all_views_are_scored(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"capacity": 12, "decay": 0.9, "consistency": 0.0, "answer_with": "slow"}
    ilora = finished(places, tmp_path, "ilora", {"ilora": {"class_path": "ILoRA", "init_args": options}})
    replay = {"class_path": "ExperienceReplay", "init_args": {"capacity": 12, "mean": "all"}}
    er = finished(places, tmp_path, "er", {"replay": replay})
    assert {cell.view for cell in table(ilora).cells(1)} == {"default", "fast", "interpolated"}
    assert scores_of(ilora, "fast") == scores_of(er) and scores_of(ilora, "fast", "accuracy") == scores_of(
        er, metric="accuracy"
    )
    rows = [scores_of(ilora, view) for view in ("default", "fast", "interpolated")]
    assert rows[0][0] == rows[1][0] == rows[2][0], "before training there is nothing between them"
    assert rows[0][1] != rows[1][1] != rows[2][1] != rows[0][1]


def test_slow_weights_follow_once_an_optimizer_step_however_many_batches_it_has(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    found = []
    for decay in (0.0, 1.0):
        options = {"capacity": 12, "decay": decay, "boundary": "keep"}
        strategies = {"ilora": {"class_path": "ILoRA", "init_args": options}}
        folder = finished(places, tmp_path, f"at{decay}", strategies, accumulate=2, batch_size=4)
        found.append((scores_of(folder), scores_of(folder, "fast")))
    assert found[0][0] == found[0][1], "at decay 0 both are the same"
    assert found[1][0][0] == found[1][0][1] == found[1][0][2] != found[1][1][2], "at decay 1 slow ones stay"


@pytest.mark.parametrize("name", ["slow weights", "orthogonal adapters", "task identity"])
def test_a_model_of_ours_with_adapters_runs_from_a_configuration(
    places: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    data = run_of(places, tmp_path / "cache", strategies=STRATEGIES[name])
    own = {"class_path": "Transformer", "init_args": {"hidden_size": 16, "num_layers": 2, "num_heads": 2}}
    data["architecture"] = {"class_path": "Adapted", "init_args": {"model": own, "lora": {"rank": 4}}}
    folder = run_folder(tmp_path, data)
    outcome = execute(folder)
    assert outcome.status == "FINISHED", outcome.reason
    before, first, _ = scores_of(folder)
    assert first[0] < before[0] and before == scores_of(folder, "slow" if name == "slow weights" else "default")[0]


def test_each_task_keeps_its_score_where_it_is_answered_by_its_own_adapter(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = finished(places, tmp_path, "one", STRATEGIES["task identity"])
    for metric in ("loss", "accuracy"):
        before, first, second = scores_of(folder, metric=metric)
        assert first[0] == second[0] and first[1] == before[1]
    assert scores_of(folder)[1][0] < scores_of(folder)[0][0]
    forgets = finished(places, tmp_path, "last", STRATEGIES["an adapter for each task"])
    assert scores_of(forgets)[2][0] != scores_of(forgets)[1][0]


def costs(folder: Path) -> dict[str, list[float]]:
    """Every cost at every boundary."""
    found: dict[str, list[float]] = {}
    for values in [entry["values"] for entry in read(folder) if "cost/steps" in entry.get("values", {})]:
        for name, value in values.items():
            found.setdefault(name.removeprefix("cost/"), []).append(value)
    return found


def test_a_buffer_that_holds_every_row_of_the_stream_is_all_of_it(places: tuple[Path, Path], tmp_path: Path) -> None:
    replay = {"class_path": "ExperienceReplay", "init_args": {"capacity": 82, "fill": "task_end"}}
    assert costs(finished(places, tmp_path, "er", {"replay": replay}))["buffer_share"] == [0.0, 0.5, 1.0]


def test_costs_count_the_adapters_that_tasks_bring_and_as_active_those_that_answer(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    totals, active = {}, {}
    for name in ("orthogonal adapters", "task identity", "slow weights"):
        found = costs(finished(places, tmp_path, name.replace(" ", "-"), STRATEGIES[name]))
        totals[name], active[name] = ([n - found["parameters"][0] for n in found[kind]]
                                      for kind in ("parameters", "active_parameters"))  # fmt: skip
    one = 2 * 2 * 4 * 32 + 2 * 4 * (32 + 16)  # rank 4 on q and v of two layers
    assert totals == {"orthogonal adapters": [0, 0, one], "task identity": [0, 0, one], "slow weights": [0, 0, 0]}
    assert active == {"orthogonal adapters": [0, 0, one], "task identity": [0, 0, 0], "slow weights": [-one] * 3}


def test_zero_shot_takes_no_step_and_scores_the_model_as_it_came(places: tuple[Path, Path], tmp_path: Path) -> None:
    folder = finished(places, tmp_path, "zero", {"zero": {"class_path": "ZeroShot"}})
    rows = scores_of(folder)
    assert rows[0] == rows[1] == rows[2]
    state = Checkpoints(folder, every_seconds=0).load()
    assert state is not None and state["global_steps"] == 0


def test_a_run_with_slow_weights_stops_where_none_are_trained(places: tuple[Path, Path], tmp_path: Path) -> None:
    data = run_of(places, tmp_path / "cache", strategies=STRATEGIES["slow weights"])
    data["training"]["optimizer"] = {"class_path": "SGD", "init_args": {"lr": 0.0}}
    outcome = execute(run_folder(tmp_path, data))
    assert outcome.status == "FAILED" and "none of the 8 fast tensors moved" in outcome.reason


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
        ("lora", {"alpha": 0.0}, "architecture.init_args.*lora.alpha: must be above 0, got 0.0"),
        ("lora", {"dropout": 1.0}, "architecture.init_args.*lora.dropout: must be at least 0 and below 1"),
        ("lora", {"targets": ["q_proj", "q_proj"]}, "architecture.init_args.*lora.targets: names a layer twice"),
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
    with pytest.raises(ConfigError, match="do not fit the context of .*, 32 tokens; shorten the stream's"):
        assemble(load_run(run_folder(tmp_path, data) / "config.yaml"), World())


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "folder": ("llama", {}, {"name": "/nowhere/model"}, {}, "name: there is no folder /nowhere/model"),
    "tokenizer": ("llama", {"vocab_size": 300}, {}, {}, "knows 300 tokens, and the stream's tokenizer 257; give the"),
    "end token": ("llama", {"vocab_size": 257, "eos_token_id": 5}, {}, {}, "end in token 5, and the stream's in 256"),
    "fused": ("gpt2", {}, {"lora": {"targets": ["c_attn"]}}, {}, "'c_attn' holds several matrices in one"),
    "experts": ("mixtral", {}, {"lora": {"targets": ["gate_up_proj"]}}, {}, "names experts of MixtralForCausalLM"),
    "no module": ("llama", {"vocab_size": 257, "eos_token_id": 256}, {"lora": {"targets": ["attn"]}}, {},
                  "no layer of LlamaForCausalLM is called 'attn'; its linear layers are"),
    "context": ("llama", {"vocab_size": 257, "eos_token_id": 256}, {},
                {"prompt_template": "x" * 60 + "{prompt}", "max_tokens": 64}, "do not fit the context"),
    "long prompts": ("llama", {"vocab_size": 257, "eos_token_id": 256}, {},
                     {"prompt_template": "x" * 60 + "{prompt}", "long_prompts": "refuse"},
                     "prompts of its train part do not fit in max_tokens .16. beside their answers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_said_by_the_command_before_anything_is_trained(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    kind, sizes, options, rows, message = BAD[case]
    if kind != "llama":
        sizes = {}
    model = model_folder(tmp_path / "models", kind, **sizes)
    data = run_of((places[0], model), tmp_path / "cache")
    if kind != "llama":
        # Models of 60 tokens, and a tokenizer of as many.
        data["stream"]["init_args"]["tokenizer"] = {"class_path": "small_models.SixtyTokens"}
    data["architecture"]["init_args"] |= options
    data["stream"]["init_args"] |= rows
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "study.yaml")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and re.search(message, " ".join(said.split())), said
    assert not list(tmp_path.glob("runs/*/*/journal.jsonl"))


def test_a_model_of_ours_is_adapted_in_a_study(places: tuple[Path, Path], tmp_path: Path) -> None:
    ours = {"class_path": "Transformer", "init_args": {"hidden_size": 32, "num_layers": 1}}
    data = run_of(places, tmp_path / "cache", architecture={"class_path": "Adapted", "init_args": {"model": ours}})
    assert execute(run_folder(tmp_path, data)).status == "FINISHED"
