"""A study's runs as MLflow holds them: statuses, tags, metrics and result tables."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clplat import journal
from clplat.config import load_run
from clplat.databases import refuse_missing
from clplat.errors import ClplatError, ConfigError, nearest
from clplat.machine import no_collector
from clplat.metrics import Interval, forgetting_over_time, interval, through_view, whole_curve
from clplat.mlflow_store import client, short
from clplat.points import Translator, may_have_other_views
from clplat.result_table import Curve, ResultTable, Scores
from clplat.study_file import load_study, run_folders
from clplat.study_record import default_uri
from clplat.tracking import STUDY_STATE

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as MLflow holds it."""

    run_id: str
    variant: str
    seed: int
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    read_tables: Callable[[], tuple[ResultTable | None, Curve]]
    """Reads the two below when they are first asked for: of a thousand runs this takes minutes, and many never are."""
    params: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    """Digests by the name of a data set."""

    @cached_property
    def _tables(self) -> tuple[ResultTable | None, Curve]:
        return self.read_tables()

    @property
    def table(self) -> ResultTable | None:
        """The result table; None until the run has ended once."""
        return self._tables[0]

    @property
    def curve(self) -> Curve:
        """Scores measured inside tasks."""
        return self._tables[1]


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All runs of a study, variants in the order in which they were configured."""

    name: str
    run_id: str
    uri: str
    baseline: str | None
    folder: str
    planned: list[tuple[str, int]]
    runs: list[RunRecord]
    is_search: bool = False
    """Whether the variants are trials of a tune, whose scores are no result: the best was chosen by them."""

    @cached_property
    def _finished(self) -> dict[str, list[RunRecord]]:
        """Finished runs of each variant by seed; a variant that has none is there too."""
        found: dict[str, list[RunRecord]] = {run.variant: [] for run in self.runs}
        for run in sorted(self.runs, key=lambda run: run.seed):
            if run.status == "FINISHED":
                found[run.variant].append(run)
        return found

    def variants(self) -> list[str]:
        """Variant names, each once."""
        return list(self._finished)

    def missing(self) -> list[tuple[str, int]]:
        """Variants and seeds that were planned and have no run."""
        there = {(run.variant, run.seed) for run in self.runs}
        return [pair for pair in self.planned if pair not in there]

    def of(self, variant: str) -> list[RunRecord]:
        """The finished runs of a variant, by seed."""
        return self._finished.get(variant, [])

    def by_seed(self, variant: str, metric: str) -> dict[int, float]:
        """A metric of every finished run of a variant that has it."""
        if metric == "intransigence":
            return self._intransigence(variant)
        found = {run.seed: run.metrics.get(metric, math.nan) for run in self.of(variant)}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def views(self, variant: str) -> list[str]:
        """The views beside the default one that finished runs of a variant were scored through."""
        viewed = [run.table for run in self.of(variant) if may_have_other_views(run.metrics)]
        return sorted({view for table in viewed if table for view in table.views()})

    def through_view(self, variant: str, view: str) -> dict[str, dict[int, float]]:
        """What `metrics.through_view` gives for the finished runs of a variant: by metric, then by seed."""
        found: dict[str, dict[int, float]] = {}
        for run in self.of(variant):
            for metric, value in through_view(run.table, view).items() if run.table else ():
                found.setdefault(metric, {})[run.seed] = value
        return found

    def interval(self, variant: str, metric: str) -> Interval:
        """Mean and interval of a metric over seeds."""
        return interval(list(self.by_seed(variant, metric).values()))

    def scores(self, variant: str) -> list[Scores]:
        """S of every finished run of a variant."""
        return [run.table.scores() for run in self.of(variant) if run.table]

    def tasks(self, variant: str) -> list[str]:
        """Task names in the variant's order, or their numbers where its seeds differ in the order."""
        orders = [run.table.tasks() for run in self.of(variant) if run.table]
        return orders[0] if all(o == orders[0] for o in orders) else [f"task {n + 1}" for n in range(len(orders[0]))]

    def final(self, variant: str, task: str) -> Interval:
        """Final score of one of `tasks(variant)` over seeds."""
        names = self.tasks(variant)
        return interval([scores[-1, names.index(task)] for scores in self.scores(variant) if task in names])

    def forgetting(self, variant: str) -> list[tuple[Scores, Scores]]:
        """Forgetting over the stream of each finished run that went through it task by task, in steps."""
        walked = [(run.table, run.curve) for run in self.of(variant) if run.table and len(run.table.rows()) > 2]
        return [
            forgetting_over_time(whole_curve(table, curve), table.steps()[1:])
            for table, curve in walked
            if len(table.rows()) == len(table.tasks()) + 1 and table.moved()
        ]

    def is_reference(self, variant: str) -> bool:
        """Whether the variant is no continual learner, but something to compare them with."""
        return any(run.tags.get("reference") == "true" for run in self.runs if run.variant == variant)

    def tag_values(self, name: str, variant: str | None = None) -> list[str]:
        """The values that a tag has among the runs, of one variant or of all."""
        runs = [run for run in self.runs if variant in (None, run.variant)]
        return list(dict.fromkeys(run.tags.get(name) or "unknown" for run in runs))

    def _intransigence(self, variant: str) -> dict[int, float]:
        """Mean over tasks of the cumulative arm's score right after a task minus this variant's, same seed."""
        arms = [run for run in self.runs if run.tags.get("strategy") == "Cumulative" and run.status == "FINISHED"]
        best = {(run.seed, run.tags.get("task_order")): _learned(run) for run in arms}
        gaps = {run.seed: best.get((run.seed, run.tags.get("task_order")), math.nan) - _learned(run)
                for run in self.of(variant)}  # fmt: skip
        return {seed: gap for seed, gap in gaps.items() if not math.isnan(gap)}


def _learned(run: RunRecord) -> float:
    """Mean over tasks of the score right after training the task; NaN where one is not known, or none was trained."""
    trained = run.table is not None and run.table.moved()
    return float(np.mean(np.diagonal(run.table.scores(), -1))) if run.table and trained else math.nan


def load_study_results(study: str, uri: str | None = None) -> StudyResults:
    """A study out of MLflow: by its folder, its name (the newest of that name), or its run id."""
    state = Path(study) / STUDY_STATE
    if Path(study).is_dir() and not (Path(study) / "study.yaml").is_file():
        its = f"; it is a run of {Path(study).parent}" if (Path(study) / "config.yaml").is_file() else ""
        raise ConfigError(f"{study}: is no study folder (study.yaml){its}")
    if Path(study).is_dir() and not state.is_file():
        raise ConfigError(f"{study}: MLflow does not know this study yet; `clplat sync {study}` sends it")
    known = json.loads(state.read_text()) if state.is_file() else {}
    uri = uri or known.get("uri") or default_uri()
    refuse_missing(uri)
    try:
        with no_collector():
            connection = client(uri)
            parent = connection.get_run(known["run_id"]) if known else _find(connection, study, uri)
            runs = [_record(connection, run) for run in _newest(_children(connection, parent))]
    except ClplatError:
        raise
    except Exception as error:
        again = f"; `clplat sync {study}` sends what is not there" if known else ""
        raise ConfigError(f"study {study!r}: MLflow at {uri} does not give it ({short(error)}){again}") from error
    if not runs:
        raise ConfigError(f"study {study!r}: MLflow at {uri} has no runs of it yet")
    tags = parent.data.tags
    is_search = tags.get("tune") == "true"
    planned = list(itertools.product(json.loads(tags["variants"]), json.loads(tags["seeds"])))
    if is_search:
        # Its trials are chosen on the way, and one that was pruned has not all seeds.
        planned = sorted((run.variant, run.seed) for run in runs)
    order = {pair: number for number, pair in enumerate(planned)}
    return StudyResults(
        name=tags["study"], run_id=parent.info.run_id, uri=uri, baseline=tags["baseline"] or None,
        folder=tags["folder"], planned=planned,
        runs=sorted(runs, key=lambda run: order.get((run.variant, run.seed), len(order))), is_search=is_search,
    )  # fmt: skip


def _find(connection: Any, study: str, uri: str) -> Any:
    experiments = [experiment.experiment_id for experiment in connection.search_experiments()]
    studies = connection.search_runs(experiments, "tags.kind = 'study'", order_by=["attributes.start_time DESC"])
    exact = [run for run in studies if study in (run.info.run_id, run.info.run_name)]
    if len(exact) > 1:
        ids = " or ".join(f"{run.info.run_id} ({run.data.tags['folder']})" for run in exact)
        raise ConfigError(f"study {study!r}: MLflow at {uri} has {len(exact)} of this name; give a run id: {ids}")
    found = exact or [run for run in studies if run.data.tags.get("study") == study]
    if found:
        return found[0]
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


def _newest(runs: list[Any]) -> list[Any]:
    """One run for each variant and seed: what was run anew stands in place of what was lost."""
    oldest_first = sorted(runs, key=lambda run: run.info.start_time)
    return list({(run.data.tags["variant"], run.data.tags["seed"]): run for run in oldest_first}.values())


def _record(connection: Any, run: Any) -> RunRecord:
    tags = run.data.tags
    return RunRecord(
        run_id=run.info.run_id, variant=tags["variant"], seed=int(tags["seed"]),
        status="PRUNED" if tags.get("pruned") == "true" and run.info.status == "KILLED" else run.info.status,
        tags=dict(tags), metrics=dict(run.data.metrics), read_tables=partial(_read_tables, connection, run.info.run_id),
        params=dict(run.data.params), data={one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs},
    )  # fmt: skip


def _read_tables(connection: Any, run_id: str) -> tuple[ResultTable | None, Curve]:
    """Result table and curve out of a run's artifacts."""
    files = {file.path for file in connection.list_artifacts(run_id)}
    tables = []
    for name in ("results.csv", "curve.csv"):
        with tempfile.TemporaryDirectory() as place:
            file = connection.download_artifacts(run_id, name, dst_path=place) if name in files else None
            tables.append(ResultTable.from_csv(Path(file)) if file else None)
    table, inside = tables
    return table, inside.as_curve() if inside else ()


def journal_results(folder: Path) -> StudyResults:
    """A study out of its own folder, for when MLflow has not got it: the same numbers that it would be sent."""
    study = load_study(folder / "study.yaml")
    return StudyResults(
        name=study.name, run_id="", uri=study.tracking.uri, baseline=study.baseline, folder=str(folder),
        planned=list(itertools.product(study.variants or [study.name], study.seeds)),
        runs=[_record_of_folder(run) for run in run_folders(folder) if (run / journal.NAME).is_file()],
    )  # fmt: skip


def measured(folder: Path) -> dict[str, float]:
    """The last value of every metric of a run, out of its own folder and as far as it has come."""
    translator = Translator()
    return {key: value for entry in journal.read(folder) for key, value, *_ in translator.points(entry)}


def _record_of_folder(folder: Path) -> RunRecord:
    config, translator = load_run(folder / "config.yaml"), Translator()
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}
    for entry in journal.read(folder):
        metrics |= {key: value for key, value, *_ in translator.points(entry)}
        if entry["kind"] == "tags":
            tags |= entry["values"]
        elif entry["kind"] == "status":
            tags["status_reason"] = entry["reason"]
    table = translator.table if translator.table.rows() else None
    return RunRecord(
        run_id="", variant=config.variant, seed=config.seed, status=journal.last_status(folder), tags=tags,
        metrics=metrics, read_tables=lambda: (table, translator.curve),
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
