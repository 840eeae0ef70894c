"""The studies of configs/trc2: every arm runs at toy size, and is what its file says it is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from clplat.components import build
from clplat.config import RunConfig
from clplat.dry_run import estimate
from clplat.strategies.controllers.replay_law import ReplayLaw
from clplat.streams.base import Spec
from clplat.study_file import expand, find, load_study
from clplat.yaml_text import parse_yaml

STUDIES = ("main", "factorial", "orders", "tiny", "large")
CONTROLLERS = ("controllers", "large_controllers", "large_report")
KINDS = {"c4": "reference", "wikitext": "source", "gsm8k": "arithmetic"}
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "inner_size": 16, "slots": 16, "k_read": 4, "capacity": 20,
         "every": 1}  # fmt: skip
TOY = {
    "TRC2": {"column": {"num_heads": 2, "heads_per_kv": 2, "inner_size": 16}, "hippocampus": {"slots": 16, "k_read": 4},
             "thalamus": {"rank": 8}},
}  # fmt: skip


def shrunk(value: Any) -> Any:
    """The same with small sizes, and orders of the embedded stream's names."""
    if isinstance(value, list):
        return [KINDS.get(item, item) if isinstance(item, str) else shrunk(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: SMALL.get(name, shrunk(item)) for name, item in value.items()}


def at_toy_size(name: str) -> dict[str, Any]:
    """A study on embedded text, with its own arms."""
    data = parse_yaml(find(f"trc2/{name}").read_text())
    data = data | {part: shrunk(data[part]) for part in ("variants", "strategies", "architecture") if part in data}
    own = data["architecture"]["init_args"]
    data["architecture"]["init_args"] = {
        group: own.get(group, {}) | sizes for group, sizes in TOY["TRC2"].items()
    } | {"hidden_size": 16, "num_layers": 2}  # fmt: skip
    data["stream"] = {
        "class_path": "StdlibText", "init_args": {"block_size": 16, "max_train_tokens": 2000, "max_eval_tokens": 64,
                                                  "max_answers": 1},
    }  # fmt: skip
    budget = data["training"]["budget"]
    data["training"]["budget"] = {key: min(amount, 2000) for key, amount in budget.items()}
    data["training"] = data["training"] | {"batch_size": 4, "precision": "32-true", "accelerator": "cpu"}
    return data | {"seeds": [0], "tracking": {"enabled": False}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path_factory.getbasetemp() / "trc2_studies"))


def runs_of(name: str) -> dict[str, RunConfig]:
    """One run of each arm."""
    return {run.variant: run for run in expand(load_study(f"trc2/{name}"))}


@pytest.mark.parametrize("name", [*STUDIES, *CONTROLLERS])
def test_every_arm_of_the_shipped_study_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"kind": "step", "step": 1, "strategy": "replay", "knob": "weight", "value": 0.5}
    (tmp_path / "decisions.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("CLPLAT_DECISIONS", str(tmp_path / "decisions.jsonl"))
    study = load_study(at_toy_size(name))
    table = estimate(study, Console(quiet=True))
    assert list(table.columns[0].cells) == list(study.variants)


def active(run: RunConfig, *, rows: int, vocabulary: int) -> int:
    spec = Spec(kind="language", input_shape=(rows,), num_outputs=vocabulary)
    with torch.device("meta"):
        return build(run.architecture, "architecture", "architecture", {"spec": spec}).active_parameters()


@pytest.mark.parametrize(
    ("name", "rows", "vocabulary"),
    [("main", 256, 4096), ("orders", 256, 4096), ("large", 512, 4096), ("tiny", 128, 1024)],
)
def test_arms_without_a_part_taken_out_have_active_parameters_within_two_percent_of_trc2s(
    name: str, rows: int, vocabulary: int
) -> None:
    counts = {v: active(run, rows=rows, vocabulary=vocabulary) for v, run in runs_of(name).items()
              if not v.startswith(("columns", "thalamus", "memory"))}  # fmt: skip
    own = next(count for variant, count in counts.items() if variant.startswith("trc2"))
    assert all(abs(count - own) <= 0.02 * own for count in counts.values()), counts


@pytest.mark.parametrize("name", CONTROLLERS)
def test_controllers_replay_as_many_rows_as_what_they_are_compared_with(name: str) -> None:
    runs = runs_of(name)
    replayed = {
        run.strategies["replay"].init_args["ratio"] for run in runs.values() if "controller" not in run.strategies
    }
    assert len(replayed) == 1
    for run in runs.values():
        options = run.strategies["controller"].init_args if "controller" in run.strategies else {}
        if options.get("mode") == "pi":
            law = options["law"] or {}
            assert (law.get("base_ratio", ReplayLaw().base_ratio), law["ratio_slope"]) == (replayed.copy().pop(), 0)


@pytest.mark.parametrize("name", STUDIES)
def test_arms_that_replay_replay_alike(name: str) -> None:
    keys = ("capacity", "policy", "draw_from", "from_task", "fill", "ring_share")
    found = set()
    for run in runs_of(name).values():
        if "replay" in run.strategies:
            options = run.strategies["replay"].init_args
            law = run.strategies["controller"].init_args if "controller" in run.strategies else None
            ratio = (
                options["ratio"]
                if law is None
                else (law["mean"] or {}).get("ratio", law["law"] and law["law"]["base_ratio"])
            )
            assert law is None or law["mode"] == "fixed" or law["law"]["ratio_slope"] == 0
            found.add((*(options[key] for key in keys), ratio))
    assert len(found) == 1 and found.pop()[-1] == 0.25


def test_the_factorial_is_the_half_in_which_the_controller_is_the_product_of_the_others() -> None:
    seen = set()
    for run in runs_of("factorial").values():
        options, replay = run.architecture.init_args, run.strategies
        thalamus = options["thalamus"] is None or options["thalamus"]["enabled"]
        memory = options["hippocampus"] is None or options["hippocampus"]["read"]
        signs = [1 if on else -1 for on in (thalamus, memory, bool(replay))]
        seen.add(tuple(signs))
        if replay:
            adaptive = replay["controller"].init_args["mode"] == "pi"
            assert adaptive == (signs[0] * signs[1] * signs[2] > 0), run.variant
    assert len(seen) == 8


def test_orders_are_the_five_others_for_both_arms() -> None:
    orders: dict[str, set[str]] = {}
    for variant, run in runs_of("orders").items():
        arm, _, letters = variant.partition("_")
        order = run.stream.init_args["order"]
        assert letters == "".join(name[0] for name in order)
        assert run.architecture.class_path.endswith({"trc2": "TRC2", "transformer": "Transformer"}[arm])
        orders.setdefault(arm, set()).add(letters)
    assert orders["trc2"] == orders["transformer"] == {"cgw", "gcw", "gwc", "wcg", "wgc"}
