"""tuning.html: what a search found and what it gained, as one file that opens without a network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from clplat.html_parts import document, heading, picture, small, table
from clplat.tuning.figures import front_figure, gain_figure
from clplat.tuning.front import Row, counts
from clplat.tuning.gain import Gain
from clplat.tuning.protocol import Protocol
from clplat.tuning.words import COSTS, named, number, setting, shown

GAIN_CAPTION = (
    "Each grey point is a seed of the report, the blue one their mean with its 95 % Student t interval. Above zero the "
    "best settings have more: of scores this is better, of forgetting worse."
)


def write_page(
    folder: Path,
    protocol: Protocol,
    rows: Sequence[Row],
    objectives: Mapping[str, int],
    gains: Sequence[Gain],
    text: str,
    report: str,
) -> Path:
    """Write tuning.html into the tune's folder and its figures into `figures`; `text` is the gain in words, `report`
    the folder of the report's study inside this one, empty where it has no page yet."""
    (folder / "figures").mkdir(exist_ok=True)
    seeds = (
        f"Tuning seeds {_numbers(protocol.trials.seeds)}; seeds of the report {_numbers(protocol.report.seeds)}. "
        + (f'<a href="{report}/report.html">Report of default and best</a>.' if report else "")
    )  # fmt: skip
    parts = [
        f"<h1>{html.escape(protocol.trials.name)}: tuned on {html.escape(protocol.tuned_on)}</h1>",
        f'<p class="finding">{html.escape(text)}</p>',
        small(f"{counts(rows)} {seeds}"),
        *([heading("Default and best on the full stream"), _gains(gains)] if gains else []),
        '<div class="figures">', *_pictures(folder / "figures", rows, objectives, gains), "</div>",
        heading("Trials"),
        small("Those of the Pareto front first, best first; empty cells are of trials that did not finish. "
              "Their objectives were measured on what was tuned on, so the best of them are too good to be true: "
              "the gain on the full stream is not."),
        _trials(protocol, rows, objectives),
        *reasons(rows),
    ]  # fmt: skip
    page = folder / "tuning.html"
    page.write_text(document(protocol.trials.name, parts))
    return page


def _pictures(
    folder: Path, rows: Sequence[Row], objectives: Mapping[str, int], gains: Sequence[Gain]
) -> list[str]:  # fmt: skip
    drawn = []
    if scored := [gain for gain in gains if gain.metric not in COSTS]:
        figure = gain_figure(scored)
        drawn.append(picture("The gain, seed by seed", "gain", figure, folder, GAIN_CAPTION))
    if any(row.objectives for row in rows):
        shape = "The objective of each trial in the order in which they began; below, trials without one."
        if len(objectives) > 1:
            shape = (
                "Each trial by its objectives. The dashed stair is the front of the two shown, which no trial is beyond"
            )
            shape += "." if len(objectives) == 2 else "; a trial on the front of all objectives may lie behind it."
        figure = front_figure(rows, objectives)
        drawn.append(picture("The search", "front", figure, folder, shape))
    return drawn


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _gains(gains: Sequence[Gain]) -> str:
    rows = [
        [named(g.metric), str(g.difference.n), shown(g.metric, g.default), shown(g.metric, g.best),
         shown(g.metric, g.difference, sign=True)]
        for g in gains
    ]  # fmt: skip
    return table(["metric", "seeds", "default", "best", "best − default, paired"], rows)


def _trials(protocol: Protocol, rows: Sequence[Row], objectives: Mapping[str, int]) -> str:
    keys = list(protocol.space.dimensions)
    first, direction = next(iter(objectives.items()))
    order = sorted(rows, key=lambda r: (not r.on_front, not r.objectives, -direction * r.objectives.get(first, 0.0)))
    body = [
        [
            row.name + (" (default)" if row.is_default else ""), "front" if row.on_front else row.state.lower(),
            *(number(name, row.objectives[name]) if row.objectives else "" for name in objectives),
            *(setting(row.settings[key]) if row.settings else "" for key in keys),
        ]
        for row in order
    ]  # fmt: skip
    return table(["trial", "status", *map(named, objectives), *(key.split(".")[-1] for key in keys)], body)


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why trials did not finish, a line each: too long for a column; those that were pruned folded up."""
    parts = []
    for state, folded in (("FAILED", False), ("RUNNING", False), ("PRUNED", True)):
        lines = [f"<li>{row.name}: {html.escape(row.reason)}</li>" for row in rows if row.state == state and row.reason]
        listed = f'<ul class="small">{"".join(lines)}</ul>'
        told = f"{len(lines)} {state.lower()}"
        if lines:
            parts.append(f"<details><summary>{told}</summary>{listed}</details>" if folded else small(told) + listed)
    return [heading("Trials that did not finish"), *parts] if parts else []
