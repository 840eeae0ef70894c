"""What tuning has gained: default and best settings on the full stream, with seeds that no trial has seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clplat.config import StudyConfig, save
from clplat.journal import NAME
from clplat.metrics import Interval, differences, interval, paired, verdict
from clplat.plan import write_plan
from clplat.report import MEANING
from clplat.storage import writing
from clplat.study import Study, carry_out, lay_out_runs, preflight
from clplat.study_file import expand
from clplat.study_results import StudyResults, journal_results
from clplat.tuning.front import Row
from clplat.tuning.protocol import Protocol
from clplat.tuning.search import mark
from clplat.tuning.words import COSTS, UNSEEN, named, number, shown

DEFAULT, BEST = "default", "best"
LOSSES = {
    "single seed": " With this seed the default settings scored higher.",
    "direction": " With these seeds the default settings scored higher.",
    "no difference shown": "",
    "difference": " The default settings score higher.",
}
"""What is added where the difference is below zero, by how far it may be trusted."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One metric with the default and with the best settings, over the report's seeds."""

    metric: str
    default: Interval
    best: Interval
    difference: Interval
    """best − default, paired by seed."""
    by_seed: dict[int, float]


def report_study(protocol: Protocol, best: Row) -> StudyConfig:
    """The study of the report: the default settings, and the best where these are others."""
    variants: dict[str, dict[str, Any]] = {DEFAULT: {}} | (
        {} if best.is_default else {BEST: protocol.space.changes(best.settings)}
    )
    return dataclasses.replace(
        protocol.report, name=f"{protocol.report.name}_report", variants=variants, baseline=DEFAULT
    )


def carry_out_report(folder: Path, protocol: Protocol, best: Row, console: Console) -> Study:
    """Run the report's study in its folder inside that of the tune, or go on with it."""
    study, place = report_study(protocol, best), folder / f"report-{best.name}"
    runs = expand(study)
    if not (place / "study.yaml").is_file():
        streams = preflight(runs, here=study.launcher.kind == "local")
        with writing(folder):
            place.mkdir(exist_ok=True)
            write_plan(place, runs, streams)
            lay_out_runs(place, runs)
            for run in runs:
                if not (place / f"{run.variant}-s{run.seed}" / NAME).is_file():
                    mark(place / f"{run.variant}-s{run.seed}", protocol.tags())
            save(study, place / "study.yaml")  # the last file: with it the layout is whole
    return carry_out(place, study, console)


def gains(place: Path, objectives: Sequence[str], seen: int) -> list[Gain]:
    """What the report's study in `place` shows: the gain in final score, of all tasks and of those alone that no trial
    has seen (the first `seen` were), in forgetting, in what was searched for, and its price.

    Empty where there is no best to compare; what neither side has is left out.
    """
    results = journal_results(place)
    if BEST not in results.variants():
        return []
    found = [_gain("final_score", *(results.by_seed(side, "final_score") for side in (DEFAULT, BEST)))]
    if seen:
        found.append(_gain(UNSEEN, *(_unseen(results, side, seen) for side in (DEFAULT, BEST))))
    for name in dict.fromkeys(["cumulative_forgetting", *objectives, *COSTS]):
        if name != "final_score":
            found.append(_gain(name, *(results.by_seed(side, name) for side in (DEFAULT, BEST))))
    return [g for g in found if g.difference.n and (g.metric not in COSTS or g.default.mean or g.best.mean)]


def _unseen(results: StudyResults, variant: str, seen: int) -> dict[int, float]:
    tables = {run.seed: run.table.scores() for run in results.of(variant) if run.table}
    return {seed: float(np.mean(table[-1, seen:])) for seed, table in tables.items() if seen < table.shape[1]}


def _gain(metric: str, default: dict[int, float], best: dict[int, float]) -> Gain:
    return Gain(
        metric=metric, default=interval(list(default.values())), best=interval(list(best.values())),
        difference=paired(best, default),
        by_seed=differences(best, default),
    )  # fmt: skip


def sentence(found: Sequence[Gain], best: Row, protocol: Protocol) -> str:
    """The gain in words, whichever its sign."""
    if not found:
        return (
            f"The default settings are the best that the search has found ({protocol.tuned_on}): the gain over them is "
            "0. Their scores on the full stream stand in the report."
        )
    first = found[0]
    text = (
        f"Gain of {best.name} over the default settings on the full stream, {first.difference.n} fresh "
        f"seed{'s' * (first.difference.n > 1)}: final score {_moved(first)}, {MEANING[verdict(first.difference)]}."
    )
    if first.difference.mean < 0:
        text += LOSSES[verdict(first.difference)]
    for gain in found[1:]:
        if gain.metric == UNSEEN:
            text += f" On the tasks alone that the search never saw: {_moved(gain)}."
        elif gain.metric not in COSTS:
            text += f" {named(gain.metric).capitalize()}: {_moved(gain)}."
    if prices := [f"{_times(gain)} the {COSTS[gain.metric]}" for gain in found if gain.metric in COSTS]:
        text += f" The best settings take {' and '.join(prices)} of the default ones."
    if protocol.on_test_sequence:
        text += " The settings were chosen on the test sequence itself: this gain is biased upwards."
    return text


def _moved(gain: Gain) -> str:
    ends = (number(gain.metric, side.mean) for side in (gain.default, gain.best))
    return f"{shown(gain.metric, gain.difference, sign=True)} ({' → '.join(ends)})"


def _times(gain: Gain) -> str:
    """How many times the default's cost; a cost that the default does not have at all, as it is."""
    if not gain.default.mean:
        return f"{number(gain.metric, gain.best.mean)}, not 0, of"
    return f"{gain.best.mean / gain.default.mean:.2f} times"
