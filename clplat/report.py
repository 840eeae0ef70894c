"""Comparison of a study's variants, read from MLflow alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.table import Table

from clplat.errors import ConfigError, nearest
from clplat.metrics import Interval, ResultTable, Scores, interval, paired, verdict
from clplat.study_record import default_uri
from clplat.tracking import STUDY_STATE, client

if TYPE_CHECKING:
    import pandas

SCORES = {
    "final_score": "final score",
    "learning_score": "learning score",
    "final_forgetting": "final forgetting",
    "cumulative_forgetting": "cumulative forgetting",
    "cumulative_forgetting_curve": "… over time",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
}
COSTS = {
    "cost/buffer_share": ("replay memory", lambda v: f"{v:.1%}"),
    "cost/replay_ratio": ("replay ratio", lambda v: f"{v:.2f}"),
    "cost/steps": ("steps", lambda v: f"{v:.0f}"),
    "rate": ("per second", lambda v: f"{v:,.0f}"),
    "cost/training_seconds": ("train s", lambda v: f"{v:.1f}"),
    "cost/evaluation_seconds": ("eval s", lambda v: f"{v:.1f}"),
    "cost/training_flops": ("FLOPs", lambda v: f"{v:.1e}"),
    "cost/peak_memory_bytes": ("peak MiB", lambda v: f"{v / 2**20:.0f}"),
    "cost/parameters": ("parameters", lambda v: f"{v:,.0f}"),
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as MLflow holds it; `table` is None until it has ended once."""

    run_id: str
    variant: str
    seed: int
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    table: ResultTable | None


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All runs of a study, variants in the order in which they were configured."""

    name: str
    run_id: str
    uri: str
    baseline: str | None
    folder: str
    runs: list[RunRecord]

    def variants(self) -> list[str]:
        """Variant names, each once."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def of(self, variant: str) -> list[RunRecord]:
        """The finished runs of a variant, by seed."""
        found = [run for run in self.runs if run.variant == variant and run.status == "FINISHED" and run.table]
        return sorted(found, key=lambda run: run.seed)

    def by_seed(self, variant: str, metric: str) -> dict[int, float]:
        """A metric of every finished run of a variant that has it."""
        if metric == "intransigence":
            return self._intransigence(variant)
        found = {run.seed: _metric(run, metric) for run in self.of(variant)}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def interval(self, variant: str, metric: str) -> Interval:
        """Mean and interval of a metric over seeds."""
        return interval(list(self.by_seed(variant, metric).values()))

    def scores(self, variant: str) -> list[Scores]:
        """S of every finished run of a variant."""
        return [run.table.scores() for run in self.of(variant) if run.table]

    def tasks(self) -> list[str]:
        """Task names of the stream."""
        return next((run.table.tasks() for run in self.runs if run.table), [])

    def is_reference(self, variant: str) -> bool:
        """Whether the variant sees more data than a continual learner may."""
        return any(run.tags.get("reference") == "true" for run in self.runs if run.variant == variant)

    def _intransigence(self, variant: str) -> dict[int, float]:
        """Mean over tasks of the cumulative arm's score right after a task minus this variant's, same seed."""
        arms = [run for run in self.runs if run.tags.get("strategy") == "Cumulative" and run.table]
        best = {run.seed: np.diagonal(run.table.scores(), -1) for run in arms if run.table}
        mine = {run.seed: np.diagonal(run.table.scores(), -1) for run in self.of(variant) if run.table}
        gaps = {seed: float(np.mean(best[seed] - mine[seed])) for seed in mine.keys() & best.keys()}
        return {seed: gap for seed, gap in gaps.items() if not math.isnan(gap)}


def _metric(run: RunRecord, name: str) -> float:
    if name == "rate":
        rates = [run.metrics[f"cost/{unit}_per_second"] for unit in ("samples", "tokens")
                 if f"cost/{unit}_per_second" in run.metrics]  # fmt: skip
        return rates[0] if rates else math.nan
    return run.metrics.get(name, math.nan)


def load_study(study: str, uri: str | None = None) -> StudyResults:
    """A study out of MLflow: by its folder, its name (the newest of that name), or its run id."""
    state = Path(study) / STUDY_STATE
    if Path(study).is_dir() and not state.is_file():
        raise ConfigError(f"{study}: MLflow does not know this study yet; `clplat sync {study}` sends it")
    known = json.loads(state.read_text()) if state.is_file() else {}
    uri = uri or known.get("uri") or default_uri()
    connection = client(uri)
    parent = connection.get_run(known["run_id"]) if known else _find(connection, study, uri)
    children = _children(connection, parent)
    tags = parent.data.tags
    order = {name: number for number, name in enumerate(json.loads(tags.get("variants", "[]")))}
    runs = sorted((_record(connection, run) for run in children), key=lambda r: (order.get(r.variant, 0), r.seed))
    if not runs:
        raise ConfigError(f"study {study!r}: MLflow at {uri} has no runs of it yet")
    return StudyResults(
        name=tags.get("study", parent.info.run_name), run_id=parent.info.run_id, uri=uri,
        baseline=tags.get("baseline") or None, folder=tags.get("folder", ""), runs=runs,
    )  # fmt: skip


def _find(connection: Any, study: str, uri: str) -> Any:
    experiments = [experiment.experiment_id for experiment in connection.search_experiments()]
    studies = connection.search_runs(experiments, "tags.kind = 'study'", order_by=["attributes.start_time DESC"])
    for run in studies:
        if study in (run.info.run_id, run.info.run_name, run.data.tags.get("study")):
            return run
    names = {run.info.run_name for run in studies} | {run.data.tags["study"] for run in studies}
    raise ConfigError(f"study {study!r}: MLflow at {uri} has none of this name or id{nearest(study, names)}")


def _children(connection: Any, parent: Any) -> list[Any]:
    """All runs below a study; MLflow gives them in pages."""
    found, token = [], None
    while True:
        page = connection.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _record(connection: Any, run: Any) -> RunRecord:
    tags = run.data.tags
    files = {file.path for file in connection.list_artifacts(run.info.run_id)}
    table = None
    if "results.csv" in files:
        table = ResultTable.from_csv(Path(connection.download_artifacts(run.info.run_id, "results.csv")))
    return RunRecord(
        run_id=run.info.run_id, variant=tags.get("variant", run.info.run_name), seed=int(tags.get("seed", -1)),
        status=run.info.status, tags=dict(tags), metrics=dict(run.data.metrics), table=table,
    )  # fmt: skip


def results_frame(study: StudyResults) -> pandas.DataFrame:
    """Every score of every run, one a row."""
    import pandas

    rows = [
        {"variant": run.variant, "seed": run.seed, "status": run.status, **entry}
        for run in study.runs
        if run.table
        for entry in run.table.to_rows()
    ]
    return pandas.DataFrame(rows)


TERMINAL = ("final_score", "final_forgetting", "cumulative_forgetting")
TERMINAL_COSTS = ("cost/buffer_share", "cost/replay_ratio", "cost/steps", "rate", "cost/training_seconds")


def compare_table(study: StudyResults, baseline: str | None = None) -> Group:
    """What a study says, for a terminal of 80 columns: scores, costs, and what to know before comparing."""
    base = _baseline(study, baseline)
    scores = Table("variant", "n", *(SCORES[m] for m in TERMINAL), *([f"score − {base}"] if base else []))
    scores.title = f"{study.name}: mean ± 95 % interval over seeds"
    scores.caption = "scores: higher is better; forgetting: lower; † reference arm: sees more data than a learner may"
    costs = Table("variant", *(COSTS[name][0] for name in TERMINAL_COSTS), title="costs (means over seeds)")
    for variant in study.variants():
        name = f"{variant} †" if study.is_reference(variant) else variant
        gap = paired(study.by_seed(variant, "final_score"), study.by_seed(base, "final_score")) if base else None
        row = [name, str(len(study.of(variant))), *(str(study.interval(variant, m)) for m in TERMINAL)]
        scores.add_row(*row, *([str(gap) if variant != base else ""] if gap is not None else []))
        costs.add_row(name, *(_cost(study, variant, cost, COSTS[cost][1]) for cost in TERMINAL_COSTS))
    return Group(scores, costs, *(f"note: {note}" for note in notes(study)))


def _cost(study: StudyResults, variant: str, name: str, show: Callable[[float], str]) -> str:
    mean = study.interval(variant, name).mean
    return "–" if math.isnan(mean) else show(mean)


def _baseline(study: StudyResults, baseline: str | None) -> str | None:
    base = baseline or study.baseline
    if base is not None and base not in study.variants():
        raise ConfigError(f"baseline: study {study.name!r} has no variant {base!r}{nearest(base, study.variants())}")
    return base


def difference(study: StudyResults, variant: str, base: str, metric: str = "final_score") -> str:
    """Paired difference to the baseline, with how it may be spoken of."""
    if variant == base:
        return ""
    found = paired(study.by_seed(variant, metric), study.by_seed(base, metric))
    return f"{found} ({verdict(found)})" if found.n else "–"


def notes(study: StudyResults) -> list[str]:
    """Missing and failed runs, and budgets that are not equal between compared arms."""
    found = [
        f"{run.variant}, seed {run.seed}: {run.status} {run.tags.get('status_reason', '')}".strip()
        for run in study.runs
        if run.status != "FINISHED"
    ]
    seeds = {run.seed for run in study.runs}
    for variant in study.variants():
        missing = seeds - {run.seed for run in study.runs if run.variant == variant}
        if missing:
            found.append(f"{variant}: no run for seeds {sorted(missing)}")
    compared = [variant for variant in study.variants() if not study.is_reference(variant)]
    replaying = [v for v in compared if study.interval(v, "cost/buffer_bytes").mean > 0]
    for name, group in (
        ("cost/steps", compared), ("cost/buffer_bytes", replaying), ("cost/replay_ratio", replaying),
    ):  # fmt: skip
        means = {variant: study.interval(variant, name).mean for variant in group}
        values = [value for value in means.values() if not math.isnan(value)]
        if values and max(values) > 1.02 * min(values):
            listed = ", ".join(f"{variant} {value:,.4g}" for variant, value in means.items())
            found.append(f"unequal {name.removeprefix('cost/')}: {listed}; these arms are not on one budget")
    return found


def finding(study: StudyResults, baseline: str | None = None) -> str:
    """The study's result in a sentence, with its interval and how far it may be trusted."""
    base = _baseline(study, baseline)
    arms = [v for v in study.variants() if not study.is_reference(v) and study.by_seed(v, "final_forgetting")]
    if not arms:
        return "No variant has finished with a final forgetting to compare."
    best = min(arms, key=lambda v: study.interval(v, "final_forgetting").mean)
    lost = study.interval(best, "final_forgetting")
    text = f"Least forgetting: {best}, {lost} (n = {lost.n})"
    if base is None or base == best:
        return text + "."
    gap = paired(study.by_seed(best, "final_forgetting"), study.by_seed(base, "final_forgetting"))
    return f"{text}; against {base} {gap} over the same seeds: {verdict(gap)}."


def write_report(study: StudyResults, out: str | Path | None = None, baseline: str | None = None) -> Path:
    """Write report.html and its figures, and attach them to the study's run in MLflow."""
    from clplat.page import render

    folder = Path(out) if out is not None else Path(study.folder if Path(study.folder).is_dir() else ".")
    folder.mkdir(parents=True, exist_ok=True)
    page = render(study, _baseline(study, baseline), folder)
    connection = client(study.uri)
    connection.log_artifact(study.run_id, str(page))
    connection.log_artifacts(study.run_id, str(folder / "figures"), "figures")
    return page


def mean_scores(study: StudyResults, variants: Sequence[str]) -> dict[str, Scores]:
    """Mean result table of each variant that has finished runs."""
    found = {variant: study.scores(variant) for variant in variants}
    return {variant: np.mean(tables, axis=0) for variant, tables in found.items() if tables}
