"""A study's description in MLflow: what came out, the comparison as a table, and the way to the report."""

from __future__ import annotations

from typing import Any

from clplat.report import SCORES, difference, finding, notes
from clplat.run_note import NOTE, artifact, escaped, fitted, markdown_table
from clplat.study_results import StudyResults


def write_note(connection: Any, study: StudyResults, baseline: str | None) -> None:
    """Describe the study's run, and say its finding in a tag, which the table of runs can show and search."""
    connection.set_tag(study.run_id, NOTE, study_note(study, baseline))
    connection.set_tag(study.run_id, "finding", finding(study, baseline)[:1000])


def study_note(study: StudyResults, baseline: str | None) -> str:
    """The Markdown for the study's run: finding, table of variants, notes, links to report and figures."""
    heads = ["variant", "n", *SCORES.values(), *([f"final − {baseline}"] if baseline else [])]
    rows = []
    for variant in study.variants():
        name = f"{variant} (reference)" if study.is_reference(variant) else variant
        row = [name, str(len(study.of(variant))), *(str(study.interval(variant, metric)) for metric in SCORES)]
        rows.append(row + ([difference(study, variant, baseline)] if baseline else []))
    facts = (" or ".join(study.tag_values(name)) for name in ("stream", "architecture", "budget"))
    return fitted(
        [
            f"**{escaped(finding(study, baseline))}**",
            f"[Open the report]({artifact(study.run_id, 'report.html')}) · {escaped(' · '.join(facts))} a task",
            *(f"Note: {escaped(note)}" for note in notes(study, baseline)[:5]),
            markdown_table(heads, rows),
            "Mean ± 95 % interval over seeds; * a difference at 95 %. Score: higher is better; forgetting: lower.",
            *_pictures(study),
        ]
    )


def _pictures(study: StudyResults) -> list[str]:
    """Only narrow figures: MLflow makes its page as wide as the widest picture, and text runs out of the window."""
    if not any(study.forgetting(variant) for variant in study.variants()):
        return []
    shown = {"learned and forgotten": "learned_and_lost", "forgetting": "forgetting"}
    return [f"![{words}]({artifact(study.run_id, f'figures/{name}.png')})" for words, name in shown.items()]
