"""tuning.html: what a search found and what it gained, as one file that opens without a network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from clplat.html_parts import document, picture, table
from clplat.tuning.figures import front_figure, gain_figure
from clplat.tuning.front import Row, said
from clplat.tuning.gain import COSTS, Gain, shown, signed
from clplat.tuning.protocol import Protocol


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
    the folder of the report's study inside this one."""
    (folder / "figures").mkdir(exist_ok=True)
    pictures = {"The search": ("front", front_figure(rows, objectives))}
    if gains:
        pictures = {
            "The gain, seed by seed": ("gain", gain_figure([g for g in gains if g.metric not in COSTS]))
        } | pictures
    parts = [
        f"<h1>{html.escape(protocol.trials.name)}: tuned on {html.escape(protocol.tuned_on)}</h1>",
        f'<p class="finding">{html.escape(text)}</p>',
        f'<p class="small">{_counts(rows)} Tuning seeds {_numbers(protocol.trials.seeds)}; seeds of the report '
        f'{_numbers(protocol.report.seeds)}. <a href="{report}/report.html">Report of default and best</a>.</p>',
        *(["<h2>Default and best on the full stream</h2>", _gains(gains)] if gains else []),
        '<div class="figures">',
        *(picture(title, *drawn, folder / "figures") for title, drawn in pictures.items()),
        "</div><h2>Trials</h2>",
        '<p class="small">Those of the Pareto front first, best first; empty cells are of trials that did not finish. '
        "Their objectives were measured on what was tuned on, so the best of them are too good to be true: "
        "the gain above is not.</p>",
        _trials(protocol, rows, objectives),
    ]
    page = folder / "tuning.html"
    page.write_text(document(protocol.trials.name, parts))
    return page


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _counts(rows: Sequence[Row]) -> str:
    states = [row.state for row in rows]
    words = {"FINISHED": "finished", "PRUNED": "pruned", "FAILED": "failed", "RUNNING": "under way"}
    parts = [f"{states.count(state)} {word}" for state, word in words.items() if state in states]
    return f"{len(rows)} trials: {', '.join(parts)}."


def _gains(gains: Sequence[Gain]) -> str:
    rows = [[g.metric, str(g.difference.n), shown(g.default), shown(g.best), signed(g.difference)] for g in gains]
    return table(["metric", "seeds", "default", "best", "best − default, paired"], rows)


def _trials(protocol: Protocol, rows: Sequence[Row], objectives: Mapping[str, int]) -> str:
    keys = list(protocol.space.dimensions)
    first, direction = next(iter(objectives.items()))
    order = sorted(rows, key=lambda r: (not r.on_front, not r.objectives, -direction * r.objectives.get(first, 0.0)))
    body = [
        [
            row.name + (" (default)" if row.is_default else ""), "front" if row.on_front else row.state.lower(),
            *(f"{row.objectives[name]:.4g}" if row.objectives else "" for name in objectives),
            *(_short(row.settings[key]) if row.settings else "" for key in keys), row.reason[:120],
        ]
        for row in order
    ]  # fmt: skip
    return table(["trial", "status", *objectives, *(key.split(".")[-1] for key in keys), ""], body)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else said(value)
