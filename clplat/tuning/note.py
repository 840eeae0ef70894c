"""A search's page in MLflow: what it gained, the best settings beside the default ones, its front, and ways on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clplat.run_note import artifact, escaped, fitted, markdown_table
from clplat.tuning.front import Row, counts
from clplat.tuning.protocol import Protocol
from clplat.tuning.space import Space
from clplat.tuning.words import named, number, setting

SHOWN = 15
"""Rows of the front that are written out; front.csv has all."""
FILES = {"tuning.html": "Open tuning.html", "front.csv": "all trials", "best.yaml": "best settings"}
PICTURES = ("gain", "front")


def tune_note(
    folder: Path, run_id: str, protocol: Protocol, rows: Sequence[Row], best: Row | None, text: str, report: str
) -> str:
    """The Markdown for the run `run_id` of the search in `folder`; `report` is the address of the report's run, empty
    where there is none."""
    links = [f"[{what}]({artifact(run_id, name)})" for name, what in FILES.items() if (folder / name).is_file()]
    links += [f"[default and best on the full stream]({report})"] if report else []
    pictures = [name for name in PICTURES if (folder / "figures" / f"{name}.png").is_file()]
    return fitted(
        [
            f"**{escaped(text)}**",
            f"Tuned on {escaped(protocol.tuned_on)}. {counts(rows)} {' · '.join(links)}",
            *(_settings(protocol.space, rows, best) if best is not None else []),
            *(f"![{name}]({artifact(run_id, f'figures/{name}.png')})" for name in pictures),
        ]
    )


def _settings(space: Space, rows: Sequence[Row], best: Row) -> list[str]:
    """The best settings and their objectives beside the default's, and those of the front."""
    default = next((row for row in rows if row.is_default), best)
    changed = [[key, setting(default.settings.get(key, "")), setting(value)] for key, value in best.settings.items()]
    shown = sorted((row for row in rows if row.on_front or row is default), key=lambda row: row is not best)[:SHOWN]
    heads = ["trial", "front", *map(named, best.objectives), *(key.split(".")[-1] for key in space.dimensions)]
    front = [
        [
            row.name + (" (default)" if row.is_default else ""), "yes" if row.on_front else "no",
            *(number(name, row.objectives[name]) if row.objectives else "" for name in best.objectives),
            *(setting(row.settings.get(key, "")) for key in space.dimensions),
        ]
        for row in shown
    ]  # fmt: skip
    return [
        markdown_table(["setting", "default", f"best ({best.name})"], changed),
        "The Pareto front, on what was tuned on: objectives of the best of many trials are too good on average.",
        markdown_table(heads, front),
    ]


def search_params(protocol: Protocol, study_tune: Mapping[str, object]) -> dict[str, str]:
    """What is searched and how, as MLflow's parameters of the search: what no resumed search may change."""
    said = {}
    for key, dimension in protocol.space.dimensions.items():
        fields = {name: value for name, value in dataclasses.asdict(dimension).items() if name not in ("key", "whole")}
        said[f"space.{key}"] = json.dumps({n: v for n, v in fields.items() if v is not None and v is not False})
    fixed = ("sampler", "sampler_seed", "objectives", "seeds", "prune", "prune_after")
    return said | {f"tune.{name}": str(study_tune[name]) for name in fixed}
