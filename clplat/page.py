"""The report as one HTML file that opens without a network: tables, and figures drawn into the page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clplat.errors import ClplatError, ConfigError
from clplat.html_parts import contents, document, heading, small, table
from clplat.metrics import interval, paired
from clplat.mlflow_store import client, short
from clplat.page_figures import few_points, pictures
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
    notes,
)  # fmt: skip
from clplat.storage import writing
from clplat.study_results import StudyResults

MEASURED = "strategy/"
"""Names of what strategies measure begin so."""


def write_report(study: StudyResults, out: str | Path | None = None, baseline: str | None = None) -> Path:
    """Write report.html and its figures, and attach them to the study's run where MLflow has one."""
    if study.is_search:
        raise ConfigError(
            f"{study.name}: is a tune, and the scores of its trials are no result, since the best was chosen by them. "
            f"{study.folder}/tuning.html tells of it; `clplat resume {study.folder}` ends it, or writes that page "
            f"anew; default and best are compared in {study.folder}/report-…, and `clplat compare` lists the trials"
        )
    folder = report_folder(Path(out) if out is not None else Path(study.folder if Path(study.folder).is_dir() else "."))
    base = baseline_of(study, baseline)
    with writing(folder, f"`clplat report {study.folder or study.name}` writes the report"):
        page = render(study, base, folder)
    if not study.run_id:
        return page
    from clplat.study_note import write_note

    connection = client(study.uri)
    try:
        connection.log_artifact(study.run_id, str(page))
        connection.log_artifacts(study.run_id, str(folder / "figures"), "figures")
        write_note(connection, study, base)
    except Exception as error:
        raise ClplatError(
            f"{page} is written, and MLflow at {study.uri} has not got it ({short(error)}); `clplat report "
            f"{study.folder or study.name}` sends it when that is mended"
        ) from error
    return page


def report_folder(folder: Path) -> Path:
    """The folder, made if it is not there, with one for figures in it."""
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: {folder} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    return folder


def render(study: StudyResults, baseline: str | None, folder: Path) -> Path:
    """Write report.html into `folder`, and every figure as PNG and SVG into its `figures`."""
    drawn, why_not = pictures(study, baseline, folder / "figures"), few_points(study)
    sections = ["Scores", *drawn, "Costs"]
    parts = [
        f"<h1>{html.escape(study.name)}</h1>",
        small(f"stream {_tag(study, 'stream')}: {_tag(study, 'task_order')}"
              f" · architecture {_tag(study, 'architecture')} · budget {_tag(study, 'budget')} a task"
              f" · seeds {', '.join(str(seed) for seed in sorted({run.seed for run in study.runs}))}"),
        f'<p class="finding">{html.escape(finding(study, baseline))}</p>',
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes(study, baseline)),
        contents(sections),
        heading("Scores"),
        small("Mean ± 95 % Student t interval over seeds. Scores are signed so that higher is better "
              "(a loss of 2 nats is −2). Forgetting: best score since training minus score now; lower is better. "
              "Differences are paired over seeds; a star marks one at 95 %, for which at least 5 seeds are needed."),
        _scores(study, baseline),
        '<div class="figures">', *drawn.values(), "</div>",
        *([f'<p class="note">{why_not}</p>'] if why_not else []),
        *([heading("Transfer"), shown] if (shown := _shown(study, TRANSFER)) else []),
        *_views(study), *_measured(study), *_ability(study),
        heading("Costs"),
        small("Means over seeds. Fidelity: how close the parts of a run are to their papers, the least "
              "close one (exact, mechanism, interpretation; standard where there is no paper to follow)."),
        _costs(study),
        small(f"From {f'the MLflow run {study.run_id}' if study.run_id else html.escape(study.folder)}. "
              f"Code {_tag(study, 'git_sha')}. Figures lie as PNG and SVG in the folder figures beside this page; "
              "their colours are those of Okabe and Ito, which colour-blind readers can tell apart, and each variant "
              "has a marker, a line and a pattern of its own."),
    ]  # fmt: skip
    page = folder / "report.html"
    page.write_text(document(study.name, parts))
    return page


def _tag(study: StudyResults, name: str) -> str:
    return html.escape(" or ".join(study.tag_values(name)))


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
    note = small(
        "The same runs scored another way: without what memories wrote, with slow or interpolated "
        "weights, by other answers. The tables above have the default view; the last column is paired over seeds."
    )
    heads = [SCORES[metric] for metric in VIEWED]
    return [heading("Other views"), note, table(["variant", "view", "n", *heads, "final − default"], rows)]


def _measured(study: StudyResults) -> list[str]:
    """What strategies have to tell of a run, such as how well a text was predicted while it was read."""
    finished = [variant for variant in study.variants() if study.of(variant)]
    names = sorted({name for v in finished for run in study.of(v) for name in run.metrics if name.startswith(MEASURED)})
    if not names:
        return []
    rows = [[name.removeprefix(MEASURED), *(str(study.interval(v, name)) for v in finished)] for name in names]
    note = small("The last value of each run, mean ± 95 % Student t interval over seeds.")
    return [heading("What strategies measured"), note, table(["", *(_name(study, v) for v in finished)], rows)]


def _ability(study: StudyResults) -> list[str]:
    shown = _shown(study, ABILITY)
    if not shown:
        return []
    note = small(
        "Written answers by each task's own metric, and multiple choice after training minus before "
        "(below zero: ability was lost). BWT divided by the tasks that could be forgotten, and as TRACE writes it by "
        "all tasks trained."
    )
    return [heading("Answers and general ability"), note, shown]


def _costs(study: StudyResults) -> str:
    rows, shown = [], {name: COSTS[name] for name in known_costs(study)}
    words = {variant: " or ".join(study.tag_values("fidelity", variant)) for variant in study.variants()}
    for variant in study.variants():
        means = [(study.interval(variant, name).mean, show) for name, (_, show) in shown.items()]
        costs = ["–" if np.isnan(mean) else show(mean) for mean, show in means]
        rows.append([_name(study, variant), *costs, words[variant]])
    return table(["variant", *(head for head, _ in shown.values()), "fidelity"], rows)
