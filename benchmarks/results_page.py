"""The tables and figures of a results page, out of MLflow alone, as Markdown.

    python benchmarks/results_page.py STUDY docs/results/NAME.md [--uri URI ...]

Of several databases the runs of the studies of that name stand together, in the order given: parts of one study.
Prints the page's generated part between two marker lines into the file, and puts its figures into a folder beside it;
what stands outside the markers is written by hand and kept.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from clplat.errors import ClplatError
from clplat.metrics import Interval, interval, paired
from clplat.mlflow_store import client
from clplat.page import write_report
from clplat.report import ABILITY, COSTS, MEASURED, VIEWED, difference, finding, known_costs, notes
from clplat.study_results import RunRecord, StudyResults, load_study_results

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
TRAIN_LOSS = """Of batches mixed with replayed rows the part of the loss that the current rows have: with `mean: all`,
as I-LoRA has it, their share of one mean, half of it where half of the rows are replayed, and no loss to compare with.
An arm that trains all tasks at once has the train loss of all of them."""
SECONDS = """Means over runs; seconds, and with them tokens a second (padding included), are those of runs in whatever
company they had on a device."""
SCORES = (
    "final_score", "learning_score", "final_forgetting", "cumulative_forgetting", "cumulative_forgetting_curve",
    "cumulative_forgetting_curve_first",
)  # fmt: skip


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def named(study: StudyResults, variant: str) -> str:
    return f"{variant} (reference)" if study.is_reference(variant) else variant


def scores(study: StudyResults) -> str:
    base = study.baseline
    rows = []
    for variant in study.variants():
        row = [named(study, variant), str(len(study.of(variant))), *(str(study.interval(variant, m)) for m in SCORES)]
        rows.append(row + ([difference(study, variant, base)] if base else []))
    heads = ["variant", "n", *(name.replace("_", " ") for name in SCORES), *([f"final score − {base}"] if base else [])]
    return markdown(heads, rows)


def costs(study: StudyResults) -> str:
    rows, shown = [], {name: COSTS[name] for name in known_costs(study)}
    for variant in study.variants():
        means = [(study.interval(variant, name).mean, show) for name, (_, show) in shown.items()]
        rows.append([named(study, variant), *("–" if math.isnan(mean) else show(mean) for mean, show in means)])
    return markdown(["variant", *(head for head, _ in shown.values())], rows)


def value(run: RunRecord, row: int, task: str, metric: str) -> float:
    cells = run.table.cells(row) if run.table and row in run.table.rows() else []
    return next((c.value for c in cells if c.task == task and c.metric == metric and c.view == "default"), math.nan)


def last_row(study: StudyResults) -> str:
    """Every metric of every task and probe at the end of the stream."""
    shown = {}
    for run in (run for variant in study.variants() for run in study.of(variant)):
        assert run.table is not None
        shown |= {(c.task, c.metric): None for c in run.table.cells(run.table.rows()[-1]) if c.view == "default"}
    rows = []
    for task, metric in shown:
        found = [interval([value(run, run.table.rows()[-1], task, metric) for run in study.of(v) if run.table])
                 for v in study.variants()]  # fmt: skip
        rows.append([f"{task} {metric.replace('_', ' ')}", *map(str, found)])
    return markdown(["", *(named(study, variant) for variant in study.variants())], rows)


def measured(study: StudyResults) -> str:
    """What question-answer sequences and strategies measure of a whole run; empty where nothing was."""
    finished = [run for variant in study.variants() for run in study.of(variant)]
    names = dict.fromkeys(
        name for run in finished for name in run.metrics if name in ABILITY or name.startswith(MEASURED)
    )
    if not names:
        return ""
    ordered = [*(name for name in ABILITY if name in names), *(name for name in names if name not in ABILITY)]
    rows = [[ABILITY.get(name, name.removeprefix(MEASURED)), *(str(study.interval(v, name)) for v in study.variants())]
            for name in ordered]  # fmt: skip
    return markdown(["", *(named(study, variant) for variant in study.variants())], rows)


def views(study: StudyResults) -> str:
    """How the same runs score through other views; empty where there is none."""
    rows = []
    for variant in study.variants():
        for view in study.views(variant):
            seen, default = study.through_view(variant, view), study.by_seed(variant, "final_score")
            shown = [str(interval(list(seen.get(metric, {}).values()))) for metric in VIEWED]
            rows.append([named(study, variant), view, *shown, str(paired(seen.get("final_score", {}), default))])
    heads = ["variant", "view", *(name.replace("_", " ") for name in VIEWED), "final score − default"]
    return markdown(heads, rows) if rows else ""


def together(studies: list[StudyResults]) -> StudyResults:
    """Parts of one study as one, whose baseline is the first one's; a run that two of them have is an error."""
    first, *others = studies
    runs = [run for study in studies for run in study.runs]
    pairs = [(run.variant, run.seed) for run in runs]
    if double := next((pair for pair in pairs if pairs.count(pair) > 1), None):
        sys.exit(f"{first.name}: two of the databases have variant {double[0]!r} with seed {double[1]}")
    planned = [pair for study in studies for pair in study.planned]
    return replace(first, planned=planned, runs=runs) if others else first


def train_and_held_out(study: StudyResults, homes: dict[str, Any]) -> str:
    """Training loss over the last logged steps of each task, beside the loss on its test set right after it; `homes`
    are the clients of MLflow that know each run."""
    rows = []
    for variant in study.variants():
        pairs: dict[str, list[tuple[float, float]]] = {}
        for run in study.of(variant):
            # Of mixed batches the part of the current rows, where the record has it.
            points = {
                point.step: point.value
                for name in ("train/loss", "train/loss_current")
                for point in homes[run.run_id].get_metric_history(run.run_id, name)
            }
            history = sorted(points.items())
            assert run.table is not None
            begin = 0
            for row, step in zip(run.table.rows(), run.table.steps(), strict=True):
                logged = [loss for at, loss in history if begin < at <= step]
                # A task that is shorter than `tracking.log_every` may have no point of its own.
                if row and logged:
                    task = run.table.tasks()[row - 1]
                    pairs.setdefault(task, []).append((logged[-1], value(run, row, task, "loss")))
                begin = step
        for task, found in pairs.items():
            columns: list[Interval] = [interval(list(column)) for column in zip(*found, strict=True)]
            gap = interval([held - trained for trained, held in found])
            rows.append([named(study, variant), task, *map(str, columns), str(gap)])
    return markdown(["variant", "after training", "train loss", "held-out loss", "gap"], rows)


def page(study: StudyResults, figures: Path, homes: dict[str, Any]) -> str:
    parts = [
        BEGIN, f"**{finding(study)}**", *(f"Note: {note}." for note in notes(study)),
        "### Scores", "Mean ± 95 % Student t interval over seeds; losses in nats with their sign turned, so higher is "
        "better. Forgetting: lower is better.", scores(study),
        *(["### What else was measured", found] if (found := measured(study)) else []),
        *(["### Through other views", found] if (found := views(study)) else []),
        "### Every metric at the end of the stream", last_row(study),
        "### Train loss beside held-out loss",
        TRAIN_LOSS, train_and_held_out(study, homes),
        "### Costs", SECONDS, costs(study), "### Figures",
        *(f"![{file.stem.replace('_', ' ')}]({figures.name}/{file.name})" for file in sorted(figures.glob("*.png"))),
        END,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("page", type=Path)
    parser.add_argument("--uri", nargs="+", default=[None], help="databases of MLflow (default: as clplat finds it)")
    options = parser.parse_args()
    old = options.page.read_text() if options.page.is_file() else f"{BEGIN}\n{END}\n"
    if (BEGIN in old) != (END in old):
        sys.exit(f"{options.page}: has one of the two marker lines, {BEGIN} and {END}; put both around the tables")
    try:
        parts = [load_study_results(options.study, uri) for uri in options.uri]
    except ClplatError as error:
        sys.exit(f"{parser.prog}: {error}")
    study = together(parts)
    homes = {run.run_id: knows for part in parts for knows in [client(part.uri)] for run in part.runs}
    folder = options.page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for drawn in (write_report(study, scratch).parent / "figures").glob("*.png"):
            shutil.copyfile(drawn, folder / drawn.name)
    before, _, rest = old.partition(BEGIN)
    options.page.write_text(before + page(study, folder, homes).rstrip("\n") + rest.partition(END)[2])


if __name__ == "__main__":
    main()
