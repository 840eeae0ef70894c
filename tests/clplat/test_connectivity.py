"""Lines between the weights of tasks: barriers of functions made by hand, and runs of every kind of model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import model_folder
from studies import run_folder, study

from clplat.api import analyze_connectivity, run
from clplat.architectures.lora import LoRA
from clplat.architectures.pretrained.model import Pretrained
from clplat.cli import main
from clplat.connectivity.analysis import analyze
from clplat.connectivity.lines import Walk, between, distance, walk
from clplat.connectivity.products import product_distance, set_adapters
from clplat.errors import ConfigError, StorageError
from clplat.execution import execute
from clplat.mlflow_store import client
from clplat.storage import read_json
from clplat.streams.base import Spec

KEPT = {"every_seconds": 0, "snapshots": "boundary"}
SPEC = Spec(kind="language", input_shape=(12,), num_outputs=60, end_token=2)
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def line(first: torch.Tensor, second: torch.Tensor, loss: Any) -> Walk:
    ends = ({"w": first}, {"w": second})
    apart = distance(*ends)
    return walk(("a", "b"), "weights", "all", apart, ALPHAS, lambda alpha: {"x": loss(between(*ends, alpha)["w"])})


def test_a_linear_model_with_quadratic_loss_has_no_barrier() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=draw).double(), torch.randn(20, generator=draw).double()
    first, second = torch.randn(2, 3, generator=draw).double()
    found = line(first, second, lambda w: float((x @ w - y).square().mean()))
    assert found.barrier("x") == 0 and found.connected("x")
    assert found.distance == pytest.approx(float((first - second).norm()))


def test_the_barrier_of_a_double_well_is_its_hill_above_the_chord() -> None:
    # (w² − 1)² + w/5 between −1 and 1: the chord is w/5, and the hill at 0 stands 1 above it.
    found = line(torch.tensor([-1.0]), torch.tensor([1.0]), lambda w: float((w**2 - 1) ** 2 + w / 5))
    assert found.losses["x"] == pytest.approx([-0.2, 0.5625 - 0.1, 1.0, 0.5625 + 0.1, 0.2])
    assert found.barrier("x") == pytest.approx(1.0) and not found.connected("x")


def test_minima_are_connected_up_to_five_per_cent_of_the_loss_of_their_ends() -> None:
    for hill, whether in ((0.049, True), (0.051, False)):
        made = Walk(first="a", second="b", space="weights", weights="all", distance=1.0, alphas=[0.0, 0.5, 1.0],
                    losses={"x": [0.8, 1.0 + hill, 1.2]})  # fmt: skip
        assert made.barrier("x") == pytest.approx(hill) and made.connected("x") is whether


def test_the_ends_of_a_line_are_the_weights_themselves_and_counts_are_not_averaged() -> None:
    first = {"w": torch.tensor([0.1, 1e8]), "seen": torch.tensor(3)}
    second = {"w": torch.tensor([0.3, -1e-8]), "seen": torch.tensor(7)}
    assert torch.equal(between(first, second, 0.0)["w"], first["w"])
    assert torch.equal(between(first, second, 1.0)["w"], second["w"])
    assert int(between(first, second, 0.5)["seen"]) == 7


def finished(folder: Path, data: dict[str, Any]) -> Path:
    run = run_folder(folder, data)
    assert execute(run).status == "FINISHED"
    return run


def test_a_run_of_images_is_walked_from_task_to_task_and_past_one(tmp_path: Path) -> None:
    run = finished(tmp_path, study(checkpoint=KEPT))
    walks = analyze(run, points=3, rows=20)
    assert [(w.first, w.second) for w in walks] == [
        ("classes-0-1", "classes-2-3"), ("classes-0-1", "classes-4-5"), ("classes-2-3", "classes-4-5")
    ]  # fmt: skip
    assert all(w.space == "weights" and w.distance > 0 and set(w.losses) == {"earlier", "later", "seen"} for w in walks)
    # One end of two lines is one set of weights, judged by one task.
    assert walks[1].losses["later"][-1] == walks[2].losses["later"][-1]
    folder, barriers = analyze_connectivity(run, points=3, rows=20, gap=1)
    assert len(barriers) == 2 * 3 and (folder / "connectivity.png").stat().st_size > 1000
    with (folder / "connectivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    assert float(rows[0]["loss"]) == walks[0].losses["earlier"][0]


def test_a_convex_loss_has_no_barrier_on_a_run_of_a_linear_model(tmp_path: Path) -> None:
    run = finished(tmp_path, study(checkpoint=KEPT, architecture__init_args={"hidden_sizes": []}))
    assert all(w.barrier(name) < 1e-6 for w in analyze(run, points=5) for name in w.losses)


def test_the_command_prints_the_barriers_and_mlflow_gets_what_was_found(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = study(checkpoint=KEPT, tracking={"enabled": True, "uri": store, "system_metrics": False}, seeds=[0])
    folder = next(run(data, quiet=True).folder.glob("*/config.yaml")).parent
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "connectivity", str(folder), "--points", "3", "--gap", "1", "--rows", "10"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "connectivity.png" in said and "α = 0 are the weights after the first" in said
    assert re.search(r"\b(yes|no)\b", said) and "True" not in said and not re.search(r"\d\.\d{5}", said)
    state = read_json(folder / "mlflow.json")
    assert state is not None
    names = {artifact.path for artifact in client(store).list_artifacts(state["run_id"])}
    assert {"connectivity.csv", "barriers.csv", "connectivity.png"} <= names


def adapted(folder: Path, strategies: dict[str, Any]) -> dict[str, Any]:
    for name, sign in (("plus", "+"), ("minus", "-")):
        (folder / name).mkdir(parents=True)
        rows = [{"prompt": f"{a}{sign}{b}=", "answer": str(a + b if sign == "+" else a - b)} for a in range(9)
                for b in range(9)]  # fmt: skip
        for part, chosen in (("train", rows[::2]), ("test", rows[3::4])):
            (folder / name / f"{part}.json").write_text(json.dumps(chosen))
    stream = {"root": str(folder), "tasks": [{"name": "plus"}, {"name": "minus"}], "max_tokens": 16, "max_answers": 0,
              "max_answer_tokens": 4, "cache_dir": str(folder / "cache")}  # fmt: skip
    model = model_folder(folder, "llama", vocab_size=257, eos_token_id=256)
    return study(
        stream={"class_path": "PromptAnswerStream", "init_args": stream},
        architecture={"class_path": "Pretrained", "init_args": {"name": str(model), "lora": {"rank": 4}}},
        training__optimizer={"class_path": "AdamW", "init_args": {"lr": 1e-2}},
        checkpoint=KEPT, strategies=strategies,
    )  # fmt: skip


def test_adapters_are_walked_by_their_factors_and_by_their_products_between_the_same_ends(tmp_path: Path) -> None:
    weights, products = analyze(finished(tmp_path, adapted(tmp_path / "tasks", {})), points=3, rows=9)
    assert (weights.space, products.space) == ("weights", "products")
    for name in ("earlier", "later", "seen"):
        ends, same = (w.losses[name][:: len(w.alphas) - 1] for w in (weights, products))
        assert ends == pytest.approx(same, rel=1e-5)
        assert weights.losses[name][1] != pytest.approx(products.losses[name][1], rel=1e-7)


def test_the_line_between_products_is_the_mean_of_the_changes_themselves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = model_folder(tmp_path, "llama")
    model = Pretrained(spec=SPEC, name=str(folder), lora=LoRA(rank=2))
    ends: Any = tuple([{name: torch.randn_like(value) for name, value in model.adapter_parameters("default").items()}]
                      for _ in range(2))  # fmt: skip
    for adapter in ("line_0", "line_1"):
        model.add_adapter(adapter)
    set_adapters(model, ["line_0", "line_1"], ends, 0.3)
    assert model.active == ("line_0", "line_1") and model.trained == ()
    layer = "model.layers.1.self_attn.v_proj"
    a, b = (model.backbone.get_submodule(layer).lora_A, model.backbone.get_submodule(layer).lora_B)
    moved = sum(b[name].weight @ a[name].weight for name in model.active)
    products = [end[0][f"{layer}.lora_B"] @ end[0][f"{layer}.lora_A"] for end in ends]
    torch.testing.assert_close(moved, 0.7 * products[0] + 0.3 * products[1])
    layers = {name.removesuffix(".lora_A") for name in ends[0][0] if name.endswith(".lora_A")}
    squares = [(ends[1][0][f"{x}.lora_B"] @ ends[1][0][f"{x}.lora_A"] - ends[0][0][f"{x}.lora_B"] @
                ends[0][0][f"{x}.lora_A"]).square().sum() for x in layers]  # fmt: skip
    assert product_distance(*ends) == pytest.approx(float(sum(squares) ** 0.5), rel=1e-5)


def test_tasks_with_an_adapter_each_have_a_line_between_their_products_alone(tmp_path: Path) -> None:
    own = {"own": {"class_path": "adapter_strategies.OneForEachTask"}}
    walks = analyze(finished(tmp_path, adapted(tmp_path / "tasks", own)), points=3, rows=9)
    assert [w.space for w in walks] == ["products"] and walks[0].distance > 0
    assert walks[0].weights == "adapter task0 → task1, not default"


@pytest.mark.parametrize("after_task", ["keep_one", "stack"])
def test_side_memories_have_a_line_where_the_same_slots_learn_on_and_else_it_is_said_that_there_is_none(
    after_task: str, tmp_path: Path
) -> None:
    locas = {"locas": {"class_path": "Locas", "init_args": {"after_task": after_task}}}
    data = adapted(tmp_path / "tasks", locas)
    whole = {"class_path": "Pretrained", "init_args": {"name": data["architecture"]["init_args"]["name"]}}
    data["architecture"] = {"class_path": "LocasModel", "init_args": {"model": whole, "memory": {"rank": 4}}}
    run = finished(tmp_path, data)
    if after_task == "keep_one":
        assert [w.space for w in analyze(run, points=3, rows=9)] == ["weights"]
    else:
        with pytest.raises(ConfigError, match="hold the same tensors, so that there is no line.*after_task: keep_one"):
            analyze(run, points=3, rows=9)


def test_a_run_with_slow_weights_says_that_its_lines_move_the_fast_ones_and_measures_these_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ilora = {"ilora": {"class_path": "ILoRA", "init_args": {"capacity": 12, "decay": 0.5}}}
    run = finished(tmp_path, adapted(tmp_path / "tasks", ilora))
    walks = analyze(run, points=3, rows=9)
    assert [w.weights for w in walks] == ["fast (adapter default, not slow)"] * 2
    first, second = (torch.load(path, weights_only=True)["architecture"] for path in sorted(run.glob("snapshots/*.pt")))
    apart = [(second[name] - first[name]).square().sum() for name in first if ".default." in name]
    assert walks[0].distance == pytest.approx(float(sum(apart) ** 0.5), rel=1e-5)
    with pytest.raises(SystemExit):
        main(["analyze", "connectivity", str(run), "--points", "3", "--rows", "9"])
    assert "weights moved: fast (adapter default, not slow)" in capsys.readouterr().out


def test_a_run_without_weights_of_its_tasks_is_refused_by_the_name_of_the_option(tmp_path: Path) -> None:
    run = finished(tmp_path, study())
    with pytest.raises(ConfigError, match="run it with checkpoint.snapshots: boundary"):
        analyze(run)
    with pytest.raises(ConfigError, match="points, gap, rows: at least 3, 1 and 1"):
        analyze(run, points=2)
    joint = finished(tmp_path / "joint", study(checkpoint=KEPT, strategies={"joint": {"class_path": "Joint"}}))
    with pytest.raises(ConfigError, match="1 of its tasks left weights, and a line has two ends"):
        analyze(joint)


def test_damaged_weights_are_not_read(tmp_path: Path) -> None:
    run = finished(tmp_path, study(checkpoint=KEPT))
    first = min((run / "snapshots").glob("*.pt"))
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(StorageError, match="damaged or cut short"):
        analyze(run)
