"""What a run writes down about itself: tags, parameters, data sets, environment, and files for the record."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from clplat.assembly import Parts
from clplat.config import RunConfig, config_hash, flat, plain
from clplat.errors import ConfigError
from clplat.journal import Journal, curve_of, read, table_of
from clplat.streams.budget import Budget

PACKAGES = (
    "clplat", "torch", "triton", "lightning", "mlflow", "torchvision", "avalanche-lib", "datasets",
    "transformers", "peft", "optuna", "numpy",
)  # fmt: skip


def describe(journal: Journal, config: RunConfig, parts: Parts, folder: Path) -> None:
    """Write the facts of a run that stay the same; on resume they are there already and nothing is added."""
    strategies = list(parts.hooks.strategies.values())
    order = parts.stream.order()
    journal.tags(
        {
            "study": config.study,
            "variant": config.variant,
            "seed": str(config.seed),
            "stream": type(parts.stream).__name__,
            "architecture": type(parts.architecture).__name__,
            "strategy": "+".join(type(s).__name__ for s in strategies) or "Naive",
            "task_order": order if len(order) <= 500 else f"{len(parts.stream.tasks)} tasks",
            "fidelity": fidelity(parts),
            "reference": str(any(s.reference for s in strategies)).lower(),
            "budget": budgets([task.budget or config.training.budget for task in parts.stream.tasks]),
            "git_sha": git_sha(),
            "config_hash": config_hash(config),
            "folder": str(folder.resolve()),
        }
    )
    journal.params({key: value for key, value in flat(plain(config)).items() if value is not None})
    journal.tags({f"stream.{name}": str(value) for name, value in parts.stream.facts().items()})
    for task in parts.stream.tasks[:50]:
        for part, data, context in (("train", task.train, "training"), ("test", task.test.data, "evaluation")):
            source = json.dumps({"stream": plain(config.stream), "task": task.name, "part": part})
            profile = json.dumps({"num_rows": len(data)})
            journal.dataset(f"{task.name}/{part}", data.digest, context, source=source, profile=profile)


def budgets(found: Sequence[Budget]) -> str:
    """The budgets of a stream's tasks in a few words: `2 epochs`, or where they differ `3 to 7 epochs`."""
    different = list(dict.fromkeys(map(str, found)))
    amounts = sorted(budget.amount() for budget in found)
    units = {unit for _, unit in amounts}
    if len(different) > 1 and len(units) == 1 and not any(budget.until for budget in found):
        return f"{amounts[0][0]:,.10g} to {amounts[-1][0]:,.10g} {units.pop()}"
    return " or ".join(different[:3]) + (" or …" if len(different) > 3 else "")


def check_data(parts: Parts, folder: Path) -> None:
    """Refuse to take a run up on other data than those that its journal names."""
    known = {entry["name"]: entry["digest"] for entry in read(folder) if entry["kind"] == "dataset"}
    for task in parts.stream.tasks:
        for part, data in (("train", task.train), ("test", task.test.data)):
            if known.get(f"{task.name}/{part}", data.digest) != data.digest:
                raise ConfigError(
                    f"{folder}: stream: the {part} data of {task.name} changed since the run was begun; bring the old "
                    "data back, or start a new study"
                )


def fidelity(parts: Parts) -> str:
    """The weakest fidelity to their papers among a run's architecture and strategies."""
    order = ("interpretation", "mechanism", "exact", "standard")
    words = [parts.architecture.fidelity, *(s.fidelity for s in parts.hooks.strategies.values())]
    return min(words, key=order.index)


@cache
def git_sha() -> str:
    """The commit of the current folder, `-dirty` with uncommitted changes, empty outside a repository."""
    if shutil.which("git") is None:
        return ""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude", "*"],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


@cache
def environment() -> str:
    """Python, platform and the versions of the packages that results depend on."""
    lines = [f"python {platform.python_version()}", f"platform {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} (not installed)")
    return "\n".join(lines) + "\n"


def write_artifacts(folder: Path) -> None:
    """Make the files that go with the record from the journal: tables, decisions, figures, environment."""
    target = folder / "artifacts"
    target.mkdir(exist_ok=True)
    shutil.copyfile(folder / "config.yaml", target / "config.yaml")
    (target / "environment.txt").write_text(environment())
    entries = list(read(folder))
    decisions = [entry for entry in entries if entry["kind"] == "decision"]
    if decisions:
        rows = [{**{k: v for k, v in d.items() if k not in ("t", "kind")}, "kind": d["event"]} for d in decisions]
        (target / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = curve_of(entries)
    if curve.rows():
        curve.to_csv(target / "curve.csv")
    results = table_of(entries)
    if results.rows():
        results.to_csv(target / "results.csv")
        from clplat.run_figures import draw_run

        draw_run(results, curve.as_curve(), target)
