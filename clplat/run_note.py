"""A run's description as MLflow shows it above everything else: what was run, its result table and heat map.

MLflow keeps it as Markdown in the tag `mlflow.note.content`. Pictures and files are linked by the address under which
MLflow's own server gives artifacts, relative to its page, so that they show wherever that server is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from clplat.config import RunConfig
from clplat.journal import read, table_of
from clplat.metrics import summary
from clplat.result_table import ResultTable

NOTE = "mlflow.note.content"
LONGEST = 7_500
"""Characters of a note; MLflow refuses tags of more than 8,000."""
WIDEST = 12
"""Tasks of a stream whose result table is written out; of a longer one the heat map shows it."""
NUMBERS = {
    "final_score": "final score",
    "learning_score": "learning score",
    "final_forgetting": "final forgetting",
    "cumulative_forgetting": "cumulative forgetting",
    "forward_transfer": "forward transfer",
}


def run_note(folder: Path, config: RunConfig, run_id: str) -> str:
    """The description of a run folder's run, for MLflow's run `run_id`."""
    entries = list(read(folder))
    found = table_of(entries)
    tags = {name: value for entry in entries if entry["kind"] == "tags" for name, value in entry["values"].items()}
    facts = [tags[name] for name in ("strategy", "architecture", "stream", "budget") if name in tags]
    parts = [
        f"**{escaped(config.variant)}**, seed {config.seed}, of {escaped(config.study)}: {escaped(' · '.join(facts))}"
    ]
    last = [entry for entry in entries if entry["kind"] == "status"][-1:]
    parts += [f"**{entry['status']}** {escaped(entry['reason'][:1000])}" for entry in last
              if entry["status"] != "FINISHED"]  # fmt: skip
    numbers = summary(found)
    if numbers:
        shown = {head: numbers[name] for name, head in NUMBERS.items() if name in numbers}
        parts.append(markdown_table(list(shown), [[f"{value:.3f}" for value in shown.values()]]))
    files = [name for name in ("heatmap.svg", "scores.svg") if (folder / "artifacts" / name).is_file()]
    if found.rows() and len(found.tasks()) <= WIDEST:
        parts += ["Scores of every task, before training and after each task (higher is better):", _scores(found)]
    parts += [f"![{name.removesuffix('.svg')}]({artifact(run_id, name)})" for name in files]
    return fitted(parts)


def _scores(found: ResultTable) -> str:
    scores, tasks = found.scores(), found.tasks()
    names = ["before", *(f"after {task}" for task in tasks)]
    rows = [[names[row], *("" if math.isnan(s) else f"{s:.3f}" for s in scores[row])] for row in found.rows()]
    return markdown_table(["", *tasks], rows)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; numbers stand on the right."""
    rule = ["---:" if number or heads[0] else ":---" for number in range(len(heads))]
    lines = [[escaped(cell) for cell in heads], rule, *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """The text with what Markdown would read as marks made harmless."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))


def artifact(run_id: str, path: str) -> str:
    """Where MLflow's server gives a run's artifact, relative to its page."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"


def fitted(parts: Sequence[str]) -> str:
    """The parts as paragraphs, those left out with which MLflow would refuse the note."""
    kept: list[str] = []
    for part in parts:
        if sum(len(one) + 2 for one in kept) + len(part) <= LONGEST:
            kept.append(part)
    return "\n\n".join(kept)
