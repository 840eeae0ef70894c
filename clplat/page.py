"""The report as one HTML file that opens without a network: tables, and figures drawn into the page."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clplat import figures
from clplat.errors import ConfigError
from clplat.metrics import interval, paired
from clplat.report import (
    ABILITY,
    COSTS,
    SCORES,
    TRANSFER,
    VIEWED,
    baseline_of,
    difference,
    finding,
    known_costs,
    mean_scores,
    notes,
)  # fmt: skip
from clplat.study_results import StudyResults
from clplat.tracking import client

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = "strategy/"
"""Names of what strategies measure begin so."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }
th, td { padding: .35rem .55rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; border-bottom: 2px solid #888 }
.finding { font-size: 1.05rem; background: #f2f6fa; padding: .8rem 1rem; border-left: 4px solid #0072B2 }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem } .figures > div { flex: 1 1 26rem; max-width: 40rem }
.note { color: #8a3b00 } .wide { overflow-x: auto } svg { max-width: 100%; height: auto } .small { color: #555 }
"""


def write_report(study: StudyResults, out: str | Path | None = None, baseline: str | None = None) -> Path:
    """Write report.html and its figures, and attach them to the study's run where MLflow has one."""
    folder = Path(out) if out is not None else Path(study.folder if Path(study.folder).is_dir() else ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: {folder} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    page = render(study, baseline_of(study, baseline), folder)
    if not study.run_id:
        return page
    from clplat.study_note import write_note

    connection = client(study.uri)
    connection.log_artifact(study.run_id, str(page))
    connection.log_artifacts(study.run_id, str(folder / "figures"), "figures")
    write_note(connection, study, baseline_of(study, baseline))
    return page


def render(study: StudyResults, baseline: str | None, folder: Path) -> Path:
    """Write report.html into `folder`, and every figure as PNG and SVG into its `figures`."""
    (folder / "figures").mkdir(exist_ok=True)
    parts = [
        f"<h1>{html.escape(study.name)}</h1>",
        f'<p class="small">stream {_tag(study, "stream")}: {_tag(study, "task_order")}'
        f" · architecture {_tag(study, 'architecture')} · budget {_tag(study, 'budget')} a task"
        f" · seeds {', '.join(str(seed) for seed in sorted({run.seed for run in study.runs}))}</p>",
        f'<p class="finding">{html.escape(finding(study, baseline))}</p>',
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes(study, baseline)),
        "<h2>Scores</h2>",
        '<p class="small">Mean ± 95 % Student t interval over seeds. Scores are signed so that higher is better '
        "(a loss of 2 nats is −2). Forgetting: best score since training minus score now; lower is better. Differences "
        "are paired over seeds; a star marks one at 95 %, for which at least 5 seeds are needed.</p>",
        _scores(study, baseline),
        *(["<h2>Transfer</h2>", shown] if (shown := _shown(study, TRANSFER)) else []),
        *_views(study),
        *_measured(study),
        *_ability(study),
        "<h2>Costs</h2>",
        '<p class="small">Means over seeds. Fidelity: how close the parts of a run are to their papers, the least '
        "close one (exact, mechanism, interpretation; standard where there is no paper to follow).</p>",
        _costs(study),
        *_figures(study, folder / "figures"),
        f'<p class="small">From {f"the MLflow run {study.run_id}" if study.run_id else html.escape(study.folder)}. '
        f"Code {_tag(study, 'git_sha')}.</p>",
    ]
    page = folder / "report.html"
    page.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(study.name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return page


def _tag(study: StudyResults, name: str) -> str:
    return html.escape(" or ".join(study.tag_values(name)))


def table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _name(study: StudyResults, variant: str) -> str:
    return f"{variant} (reference)" if study.is_reference(variant) else variant


def _scores(study: StudyResults, baseline: str | None) -> str:
    rows = []
    for variant in study.variants():
        row = [_name(study, variant), str(len(study.of(variant)))]
        row += [str(study.interval(variant, metric)) for metric in SCORES]
        rows.append(row + ([difference(study, variant, baseline)] if baseline else []))
    return table(["variant", "n", *SCORES.values(), *([f"final − {baseline}"] if baseline else [])], rows)


def _shown(study: StudyResults, heads: Mapping[str, str]) -> str:
    """A table of those metrics that any run has; empty without one."""
    shown = {m: head for m, head in heads.items() if any(study.by_seed(v, m) for v in study.variants())}
    rows = [[_name(study, v), *(str(study.interval(v, metric)) for metric in shown)] for v in study.variants()]
    return table(["variant", *shown.values()], rows) if shown else ""


def _views(study: StudyResults) -> list[str]:
    """How the same runs score through other views; nothing where there is none."""
    rows = []
    for variant in study.variants():
        for view in study.views(variant):
            seen = study.through_view(variant, view)
            shown = [str(interval(list(seen.get(metric, {}).values()))) for metric in VIEWED]
            final = seen.get("final_score", {})
            apart = paired(final, study.by_seed(variant, "final_score"))
            rows.append([_name(study, variant), view, str(len(final)), *shown, str(apart)])
    if not rows:
        return []
    note = (
        '<p class="small">The same runs scored another way: without what memories wrote, with slow or interpolated '
        "weights, by other answers. The tables above have the default view; the last column is paired over seeds.</p>"
    )
    heads = [SCORES[metric] for metric in VIEWED]
    return ["<h2>Other views</h2>", note, table(["variant", "view", "n", *heads, "final − default"], rows)]


def _measured(study: StudyResults) -> list[str]:
    """What strategies have to tell of a run, such as how well a text was predicted while it was read."""
    finished = [variant for variant in study.variants() if study.of(variant)]
    names = sorted({name for v in finished for run in study.of(v) for name in run.metrics if name.startswith(MEASURED)})
    if not names:
        return []
    rows = [[name.removeprefix(MEASURED), *(str(study.interval(v, name)) for v in finished)] for name in names]
    note = '<p class="small">The last value of each run, mean ± 95 % Student t interval over seeds.</p>'
    return ["<h2>What strategies measured</h2>", note, table(["", *(_name(study, v) for v in finished)], rows)]


def _ability(study: StudyResults) -> list[str]:
    shown = _shown(study, ABILITY)
    if not shown:
        return []
    note = (
        '<p class="small">Written answers by each task\'s own metric, and multiple choice after training minus before '
        "(below zero: ability was lost). BWT divided by the tasks that could be forgotten, and as TRACE writes it by "
        "all tasks trained.</p>"
    )
    return ["<h2>Answers and general ability</h2>", note, shown]


def _costs(study: StudyResults) -> str:
    rows, shown = [], {name: COSTS[name] for name in known_costs(study)}
    words = {variant: " or ".join(study.tag_values("fidelity", variant)) for variant in study.variants()}
    for variant in study.variants():
        means = [(study.interval(variant, name).mean, show) for name, (_, show) in shown.items()]
        costs = ["–" if np.isnan(mean) else show(mean) for mean, show in means]
        rows.append([_name(study, variant), *costs, words[variant]])
    return table(["variant", *(head for head, _ in shown.values()), "fidelity"], rows)


def _figures(study: StudyResults, folder: Path) -> list[str]:
    finished = [variant for variant in study.variants() if study.scores(variant)]
    if not finished:
        return []
    several = [v for v in finished if study.forgetting(v)]
    tasks = {variant: study.tasks(variant) for variant in finished}
    bars = {variant: {task: study.final(variant, task) for task in names} for variant, names in tasks.items()}
    costs = {v: (study.interval(v, "final_score"), study.interval(v, "cost/training_seconds")) for v in finished}
    drawn = {
        "Result tables": ("heat_maps", figures.heat_maps(mean_scores(study, several or finished), tasks)),
        "Final scores by task": ("final_scores", figures.final_scores(bars)),
        "Score and cost": ("cost", figures.score_and_cost(costs, "training seconds")),
    }
    if several:
        # All variants are passed, so that each has one colour throughout the page.
        lost = {v: (study.interval(v, "final_forgetting"), study.interval(v, "learning_score")) for v in finished}
        if any(np.isfinite(forgetting.mean + learned.mean) for forgetting, learned in lost.values()):
            drawn["Learned and forgotten"] = ("learned_and_lost", figures.learned_and_lost(lost))
        drawn["Forgetting"] = ("forgetting", figures.forgetting_curves({v: study.forgetting(v) for v in finished}))
    parts = []
    for title, (name, figure) in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        parts.append(f"<div><h2>{title}</h2>{inline(figure, folder / f'{name}.svg')}</div>")
    return [parts[0], '<div class="figures">', *parts[1:], "</div>", *_few_points(study, several)]


def _few_points(study: StudyResults, several: Sequence[str]) -> list[str]:
    """Why there is no figure of forgetting, or one without lines."""
    if not several:
        why = "No figure of forgetting: no run was trained on two tasks or more, one after another."
    elif all(len(places) < 2 for variant in several for places, _ in study.forgetting(variant)):
        why = ("Two tasks give each arm one point of forgetting, after the second; with evaluation.every, runs are "
               "scored inside tasks too, and points become lines.")  # fmt: skip
    else:
        return []
    return [f'<p class="note">{why}</p>']


def inline(figure: Figure, path: Path) -> str:
    """The figure as SVG text; text stays text, so that the page can be searched."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    path.write_text(text)
    return text[text.index("<svg") :]
