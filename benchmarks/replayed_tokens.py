"""What a study's replayed tokens bought: forgetting and learning through every view, as a Markdown table.

    python -P benchmarks/replayed_tokens.py STUDY_FOLDER [BASELINE]

For each variant and view: cumulative forgetting (boundary rows, signed), boundary score (mean over tasks of the
headline metric when the task has just been trained), final score, replayed tokens for each current one and bytes kept.
Means over finished seeds ± half of a 95 % Student t interval; differences from BASELINE (default: er) through its
default view are paired by seed. Scores have their sign turned for losses, so higher is better.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from clplat.journal import last_status, read, table
from clplat.metrics import cumulative_forgetting, interval, paired
from clplat.result_table import ResultTable, Scores

HEAD = ("variant", "view", "n", "cumulative forgetting", "boundary score", "final score", "difference in forgetting",
        "difference in boundary score", "replayed / current tokens", "bytes kept")  # fmt: skip


def scores_through(found: ResultTable, view: str) -> Scores:
    """S (T+1, T): each task's headline metric as it is answered through another view."""
    headline = {cell.index: (cell.metric, cell.higher_is_better) for cell in found.cells(0) if cell.headline}
    columns = [found.matrix(metric, view)[:, index] * (1 if up else -1) for index, (metric, up) in
               sorted((index, kind) for index, kind in headline.items() if index is not None)]  # fmt: skip
    return np.stack(columns, axis=1)


def costs_of(folder: Path) -> dict[str, float]:
    """The last of each cost."""
    costs: dict[str, float] = {}
    for entry in read(folder):
        if entry["kind"] == "metric":
            costs |= {key: value for key, value in entry["values"].items() if key.startswith("cost/")}
    return costs


def measured(folder: Path) -> dict[str, list[float]]:
    """By view: cumulative forgetting, boundary and final score, replay ratio, bytes kept."""
    found, costs = table(folder), costs_of(folder)
    rows = {}
    for view in sorted({cell.view for cell in found.cells(0)}):
        scores = scores_through(found, view)
        learnt = float(np.diagonal(scores, -1).mean())
        rows[view] = [cumulative_forgetting(scores), learnt, float(scores[-1].mean()), costs["cost/replay_ratio"],
                      costs["cost/buffer_bytes"]]  # fmt: skip
    return rows


def lines(folder: Path, baseline: str) -> list[str]:
    """The table, a variant with all its views together."""
    runs: dict[tuple[str, str], dict[int, list[float]]] = {}
    for run in sorted(path.parent for path in folder.glob("*-s*/config.yaml")):
        variant, _, seed = run.name.rpartition("-s")
        if last_status(run) == "FINISHED":
            for view, values in measured(run).items():
                runs.setdefault((variant, view), {})[int(seed)] = values
    base = runs.get((baseline, "default"), {})
    text = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for (variant, view), by_seed in runs.items():
        means = [str(interval([values[place] for values in by_seed.values()])) for place in range(3)]
        apart = [paired({s: v[place] for s, v in by_seed.items()}, {s: v[place] for s, v in base.items()})
                 for place in range(2)]  # fmt: skip
        ratio, kept = (float(np.mean([values[place] for values in by_seed.values()])) for place in (3, 4))
        row = [variant, view, str(len(by_seed)), *means, *map(str, apart), f"{ratio:.4f}", f"{kept:,.0f}"]
        text.append(f"| {' | '.join(row)} |")
    return text


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__)
        return 2
    found = lines(Path(arguments[0]), arguments[1] if len(arguments) == 2 else "er")
    if len(found) == 2:
        print(f"{arguments[0]}: has no finished run", file=sys.stderr)
        return 1
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
