"""What a study was begun with, `planned.json` beside its study.yaml, and whether it is still the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.config import RunConfig, StudyConfig, difference, parse, plain
from clplat.errors import ConfigError
from clplat.storage import write_json
from clplat.streams.base import Stream
from clplat.study_file import expand, with_checked_components

NAME = "planned.json"


def first_seed(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """One run of each variant: that of the study's first seed."""
    return [run for run in runs if run.seed == runs[0].seed]


def read_tasks(run: RunConfig, stream: Stream) -> dict[str, Any]:
    """What a run's stream holds: its tasks in their order, each with the digests of what it trains and tests on."""
    tasks = {task.name: [task.train.digest, task.test.data.digest] for task in stream.tasks}
    return {"stream": plain(run.stream), "seed": run.seed, "order": list(tasks), "digests": tasks}


def write_plan(folder: Path, runs: Sequence[RunConfig], streams: Sequence[Mapping[str, Any]]) -> None:
    """Write down seeds, each variant's effective configuration, and the tasks and data of the study's streams."""
    variants = {run.variant: plain(run) for run in first_seed(runs)}
    seeds = list(dict.fromkeys(run.seed for run in runs))
    write_json(folder / NAME, {"seeds": seeds, "variants": variants, "streams": list(streams)})


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of a study folder; None where it has none."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        plan = json.loads(path.read_text())
        return {key: plan[key] for key in ("seeds", "variants", "streams")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); delete it, and the study resumes without the comparison with its beginning"
        ) from error


def check_plan(folder: Path, study: StudyConfig) -> None:
    """Refuse a study whose seeds, variants or configurations are not those that it was begun with."""
    plan = read_plan(folder)
    if plan is None:
        return
    now = {run.variant: run for run in first_seed(expand(study))}
    changed = [
        f"{key}: {list(before)} → {list(after)}"
        for key, before, after in (("seeds", plan["seeds"], study.seeds), ("variants", plan["variants"], now))
        if set(before) != set(after)
    ]
    where: dict[str, list[str]] = {}
    for variant in [variant for variant in plan["variants"] if variant in now]:
        # What was begun before an option existed has that option's default.
        before = with_checked_components(parse(RunConfig, plan["variants"][variant]))
        for text in difference(before, dataclasses.replace(now[variant], seed=before.seed)):
            where.setdefault(text, []).append(variant)
    changed += [text if len(found) == len(now) else f"{text} ({', '.join(found)})" for text, found in where.items()]
    if changed:
        raise ConfigError(
            f"{folder / 'study.yaml'}: is not what the study was begun with ({'; '.join(changed)}); undo the change, "
            "or start a new study with it"
        )


def check_data(folder: Path) -> None:
    """Refuse to go on with data, or an order of tasks, that are not those that the study was begun with."""
    from clplat.assembly import prepared_stream

    plan = read_plan(folder)
    if plan is None:
        return
    for before in plan["streams"]:
        config = next(c for c in plan["variants"].values() if c["stream"] == before["stream"])
        run = dataclasses.replace(parse(RunConfig, config), seed=before["seed"])
        now = read_tasks(run, prepared_stream(run))
        if before["order"] != now["order"]:
            raise ConfigError(
                f"{folder}: stream: the tasks are not those that the study was begun with "
                f"({', '.join(before['order'])} → {', '.join(now['order'])}); undo the change, or start a new study"
            )
        if changed := [task for task in now["order"] if before["digests"][task] != now["digests"][task]]:
            raise ConfigError(
                f"{folder}: stream: the data of {', '.join(changed)} changed since the study was begun, and its runs "
                "would not be comparable; bring the old data back, or start a new study"
            )
