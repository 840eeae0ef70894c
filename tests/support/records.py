"""Studies made up from numbers: journals and MLflow runs as real studies leave them, without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from studies import study

from clplat.config import flat, plain
from clplat.journal import Journal
from clplat.metrics import summary
from clplat.record import write_artifacts
from clplat.result_table import Cell, ResultTable
from clplat.study import lay_out
from clplat.study_file import expand, load_study
from clplat.study_record import finish_study, start_study
from clplat.study_results import RunRecord, StudyResults
from clplat.tracking import Feed

Rows = Sequence[Sequence[float] | None]


def cells(scores: Sequence[float], tasks: Sequence[str], *, higher: bool = True) -> list[Cell]:
    """Headline cells of one row."""
    return [
        Cell(view="default", metric="accuracy" if higher else "loss", task=task, index=k, value=value,
             total=value * 10, count=10.0, higher_is_better=higher, headline=True)
        for k, (task, value) in enumerate(zip(tasks, scores, strict=True))
    ]  # fmt: skip


class Made:
    """A study whose runs are written by `run`, in MLflow after `done`."""

    def __init__(self, uri: str, variants: Sequence[str], seeds: Sequence[int], baseline: str | None = None) -> None:
        data = study(
            variants={name: {} for name in variants}, seeds=list(seeds), baseline=baseline,
            tracking={"enabled": True, "uri": uri, "system_metrics": False},
        )  # fmt: skip
        config = load_study(data)
        self.configs = {(run.variant, run.seed): run for run in expand(config)}
        self.folder: Path = lay_out(config, list(self.configs.values()))
        start_study(self.folder)

    def run(
        self,
        variant: str,
        seed: int,
        rows: Rows,
        *,
        tasks: Sequence[str] = ("a", "b"),
        costs: Mapping[str, float] | None = None,
        steps: Mapping[str, Mapping[int, float]] | None = None,
        tags: Mapping[str, str] | None = None,
        status: str = "FINISHED",
        reason: str = "",
        higher: bool = True,
        row_steps: int = 10,
        views: Mapping[str, Rows] | None = None,
    ) -> None:
        """Write and send one run: `rows` of its result table from the row before training on, None for one left out.

        `costs` are recorded at every row, `steps` are metrics by name and optimizer step, `row_steps` lie between rows,
        `views` are the rows of other views.
        """
        folder = self.folder / f"{variant}-s{seed}"
        journal = Journal(folder)
        known = {"variant": variant, "seed": str(seed), "reference": "false", "task_order": ">".join(tasks)}
        journal.tags(known | dict(tags or {}))
        journal.params(flat(plain(self.configs[variant, seed])))
        for row, scores in enumerate(rows):
            if scores is None:
                continue
            seen = cells(scores, tasks, higher=higher)
            for view, others in (views or {}).items():
                beside = cells(others[row] or [], tasks, higher=higher)
                seen += [replace(cell, view=view, headline=False) for cell in beside]
            journal.results(row, row_steps * row, seen)
            journal.metrics(row_steps * row, {"cost/steps": float(row_steps * row)} | dict(costs or {}))
        for name, points in (steps or {}).items():
            for step, point in points.items():
                journal.metrics(step, {name: point})
        journal.status(status, reason)
        journal.flush()
        write_artifacts(folder)
        feed = Feed(folder, self.configs[variant, seed].tracking)
        assert feed.finish(status), feed
        self.done()

    def done(self) -> None:
        """Give the study its status as of now."""
        finish_study(self.folder, ["FINISHED"])


def remembered(
    name: str,
    runs: Mapping[str, Mapping[int, Rows]],
    *,
    baseline: str | None = None,
    higher: bool = True,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    tags: Mapping[str, Mapping[str, str]] | None = None,
) -> StudyResults:
    """A study of two tasks as MLflow would give it, without MLflow: rows of result tables by variant and seed.

    `costs` and `tags` are by variant; the study has no run id, so that a report of it is sent nowhere.
    """
    records = []
    for variant, seeds in runs.items():
        for seed, rows in seeds.items():
            table = ResultTable()
            for row, scores in enumerate(rows):
                table.add(row, 10 * row, cells(scores or [], ("a", "b"), higher=higher))
            records.append(
                RunRecord(run_id="", variant=variant, seed=seed, status="FINISHED",
                          tags={"stream": name, "reference": "false"} | dict((tags or {}).get(variant, {})),
                          metrics=summary(table) | {"cost/steps": 20.0} | dict((costs or {}).get(variant, {})),
                          params={"stream.class_path": name}, data={"a/train": name},
                          read_tables=lambda table=table: (table, ()))  # type: ignore[misc]
            )  # fmt: skip
    planned = [(record.variant, record.seed) for record in records]
    return StudyResults(name=name, run_id="", uri="", baseline=baseline, folder=name, planned=planned, runs=records)
