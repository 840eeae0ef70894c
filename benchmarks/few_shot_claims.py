"""The two claims about FastSlow, and every arm beside it, out of the folder of a few-shot study, as Markdown.

    python benchmarks/few_shot_claims.py runs/few_shot_omniglot-… [--ours fast_slow] [--theirs joint]

Mean ± 95 % Student t interval over seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from results_page import markdown

from clplat.metrics import Interval, interval, paired, verdict
from clplat.study_results import RunRecord, StudyResults, journal_results

Values = dict[int, float]


def probe(run: RunRecord, row: int, name: str, view: str, metric: str = "accuracy") -> float:
    """A probe's score in a row of the result table (−1: the last); NaN where it was not measured."""
    assert run.table is not None
    rows = run.table.rows()
    cells = run.table.cells(rows[row] if row < 0 else row) if row < 0 or row in rows else []
    found = [c.value for c in cells if c.index is None and (c.task, c.view, c.metric) == (name, view, metric)]
    return found[0] if found else math.nan


def final(study: StudyResults, variant: str, part: slice) -> Values:
    """Mean final accuracy over some of the tasks, by seed."""
    return {run.seed: float(np.mean(run.table.scores()[-1, part])) for run in study.of(variant) if run.table}


def probes(study: StudyResults, variant: str, row: int, name: str, view: str) -> Values:
    found = {run.seed: probe(run, row, name, view) for run in study.of(variant)}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def view_of(study: StudyResults, variant: str, name: str) -> str:
    return "slow" if probes(study, variant, -1, name, "slow") else "default"


def said(difference: Interval) -> str:
    return f"{difference} (n = {difference.n}: {verdict(difference)})"


def arms(study: StudyResults, names: list[str], ours: str) -> str:
    """All arms: final accuracy, its difference from ours, and few-shot accuracy on novel classes at the end."""
    rows = []
    for variant in study.variants():
        whole = final(study, variant, slice(None))
        if not whole:
            continue
        apart = "" if variant == ours else str(paired(whole, final(study, ours, slice(None))))
        row = [variant, str(len(whole)), str(interval(list(whole.values()))), apart]
        row += [str(interval(list(final(study, variant, part).values()))) for part in (slice(1, None), slice(0, 1))]
        ends = [probes(study, variant, -1, name, view_of(study, variant, name)) for name in names]
        rows.append(row + [str(interval(list(end.values()))) for end in ends])
    heads = ["arm", "n", "final accuracy", f"− {ours}", "few-shot tasks", "base task", *names]
    return markdown(heads, rows)


def claims(study: StudyResults, names: list[str], ours: str, theirs: str) -> str:
    lines = [
        f"Final accuracy, {ours} − {theirs}: "
        + said(paired(final(study, ours, slice(None)), final(study, theirs, slice(None)))),
        "The same over the few-shot tasks alone: "
        + said(paired(final(study, ours, slice(1, None)), final(study, theirs, slice(1, None)))),
    ]
    for name in names:
        ends = {row: probes(study, ours, row, name, "slow") for row in (1, 2, -1)}
        lines.append(f"{name}, slow weights, last − first few-shot task: " + said(paired(ends[-1], ends[2])))
        lines.append(f"{name}, slow weights, last few-shot task − base task: " + said(paired(ends[-1], ends[1])))
    return "\n".join(f"- {line}" for line in lines)


def growth(study: StudyResults, names: list[str]) -> str:
    """Few-shot accuracy after the base, the first and the last few-shot task, and the change between the last two."""
    rows = []
    for variant in study.variants():
        for name in names:
            view = view_of(study, variant, name)
            ends = [probes(study, variant, row, name, view) for row in (1, 2, -1)]
            if ends[1]:
                shown = [str(interval(list(end.values()))) for end in ends]
                rows.append([variant, view, name, *shown, str(paired(ends[2], ends[1]))])
    return markdown(["arm", "view", "probe", "after base", "after shots-1", "at the end", "end − shots-1"], rows)


def within(study: StudyResults, names: list[str], ours: str) -> str:
    """How well the episodes of one run settle its score: the largest half width of a run's own interval."""
    halves = [probe(run, -1, name, "slow", "half_width") for run in study.of(ours) for name in names]
    return f"Half width of one run's own 95 % interval over episodes, at most: {max(halves):.4f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--ours", default="fast_slow")
    parser.add_argument("--theirs", default="joint")
    options = parser.parse_args()
    study = journal_results(options.study)
    first = study.of(options.ours)[0].table
    assert first is not None
    names = list(dict.fromkeys(cell.task for cell in first.cells(0) if cell.index is None))
    print(claims(study, names, options.ours, options.theirs), within(study, names, options.ours), sep="\n\n")
    print("", arms(study, names, options.ours), growth(study, names), sep="\n\n")


if __name__ == "__main__":
    main()
