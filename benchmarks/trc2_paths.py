"""What the loops of trained TRC² models are worth: test losses with both loops and through the columns alone.

    python -P benchmarks/trc2_paths.py STUDY_FOLDER VARIANT [VARIANT ...]

The columns alone are the way of replayed rows (`replay_path: bare`). For each variant and task, in nats a token over
the finished seeds, mean ± half of a 95 % Student t interval: loss with loops, without, and their difference by seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import clplat
from clplat.architectures.base import Architecture
from clplat.architectures.trc2.model import TRC2
from clplat.assembly import prepared_stream
from clplat.config import load_run
from clplat.errors import ClplatError
from clplat.journal import last_status
from clplat.metrics import interval
from clplat.streams.base import Task
from clplat.streams.batch import IGNORE, REPLAY


@torch.no_grad()
def loss(model: Architecture, task: Task, *, alone: bool) -> float:
    """Mean over the predictions of a task's test set."""
    total, count = 0.0, 0
    for rows in torch.arange(len(task.test.data)).split(64):
        batch = task.test.data.batch(rows)
        logits = model(batch.replaced(origin=torch.full((len(rows),), REPLAY) if alone else None)).logits
        total += float(
            F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
        )
        count += int((batch.targets != IGNORE).sum())
    return total / count


def lines(study: Path, variants: list[str]) -> list[str]:
    text = ["| variant | task | n | with loops | columns alone | difference |", "|---|---|---|---|---|---|"]
    for variant in variants:
        found: dict[str, list[tuple[float, float]]] = {}
        for folder in sorted(study.glob(f"{variant}-s[0-9]*")):
            if last_status(folder) != "FINISHED":
                continue
            model, stream = clplat.load_model(folder).eval(), prepared_stream(load_run(folder / "config.yaml"))
            if not isinstance(model, TRC2) or model.replay_path != "bare":
                sys.exit(f"{folder}: is no TRC2 whose replay_path is bare")
            for task in stream.tasks:
                both = loss(model, task, alone=False), loss(model, task, alone=True)
                found.setdefault(task.name, []).append(both)
        for task, pairs in found.items():
            with_loops, alone = (interval(list(column)) for column in zip(*pairs, strict=True))
            apart = interval([one - other for one, other in pairs])
            text.append(f"| {variant} | {task} | {len(pairs)} | {with_loops} | {alone} | {apart} |")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    options = parser.parse_args()
    try:
        found = lines(options.study, options.variants)
    except ClplatError as error:
        sys.exit(f"{parser.prog}: {error}")
    if len(found) == 2:
        sys.exit(f"{options.study}: has no finished run of {', '.join(options.variants)}")
    print("\n".join(found))


if __name__ == "__main__":
    main()
