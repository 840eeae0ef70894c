"""How MLflow's pages show a study: as model training, with named views whose columns a person asks for first.

MLflow 3 keeps a named view of the table of runs as a tag of the experiment (`mlflow.sharedViewState.<id>`), lists it
under "Views", and opens it by the id in the address. Versions that do not know this leave the tag alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""What an experiment is: without it MLflow asks, or takes it for traces of language-model applications."""
COLOUR = "mlflow.runColor"
VIEW = "mlflow.sharedViewState."
OURS = "clplat."
"""Ids of our views begin so; whatever a person has saved is left alone."""
KEPT = 50
"""Views of studies that an experiment keeps, the newest: MLflow reads all of them with every page."""
COLUMNS = (
    ("metrics", "final_forgetting"), ("metrics", "final_score"), ("metrics", "learning_score"), ("tags", "strategy"),
)  # fmt: skip
"""What the table shows beside names and times. MLflow puts metrics in the order of their names, and three of
them fit beside its assistant: a cost or a sum whose name comes before would push the score out of the window."""
CHARTS = "^final_score$|^final_forgetting$|^cumulative_forgetting$|^average_score$"
"""Which of the charts that MLflow makes of every metric are shown, until somebody clears its search box."""


def view_id(study_run: str) -> str:
    """The id of a study's view."""
    return f"{OURS}{study_run}"


def study_view(study_run: str, now: int, columns: Sequence[tuple[str, str]] = COLUMNS) -> str:
    """The value of the tag that shows the runs of a study alone, with these columns and the charts above; `now` in
    ms."""
    state = {
        "searchFilter": f"tags.study_run = '{study_run}' and tags.kind = 'run'",
        "orderByKey": "tags.`variant`", "orderByAsc": True,
        "selectedColumns": [f"{kind}.`{name}`" for kind, name in columns],
        "chartsSearchFilter": CHARTS,
    }  # fmt: skip
    return json.dumps({"name": study_run, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def add_view(
    connection: Any, experiment: str, study_run: str, now: int, columns: Sequence[tuple[str, str]] = COLUMNS
) -> None:
    """Write a study's view into its experiment, and take away those of ours beyond the newest `KEPT`."""
    prefix = VIEW + OURS
    old = {key: json.loads(value)["createdAt"] for key, value in connection.get_experiment(experiment).tags.items()
           if key.startswith(prefix)}  # fmt: skip
    connection.set_experiment_tag(experiment, VIEW + view_id(study_run), study_view(study_run, now, columns))
    old.pop(VIEW + view_id(study_run), None)
    for key in sorted(old, key=lambda key: old[key])[: max(0, len(old) - KEPT + 1)]:
        connection.delete_experiment_tag(experiment, key)


def colours(variants: Sequence[str]) -> dict[str, str]:
    """The colour of each variant, the same as in the report."""
    from clplat.figures import PALETTE

    return {variant: PALETTE[number % len(PALETTE)] for number, variant in enumerate(variants)}


def page_of_study(experiment: str, study_run: str) -> str:
    """The page of a study's runs, relative to the server: model training, our view."""
    return (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={quote(view_id(study_run))}"
    )
