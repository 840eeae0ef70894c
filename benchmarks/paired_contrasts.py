"""What one change is worth: differences between arms of a study, seed by seed, as a Markdown table.

    python -P benchmarks/paired_contrasts.py STUDY_FOLDER ARM:OTHER [ARM:OTHER ...]

For each pair ARM − OTHER: mean over the seeds that both have finished, ± half of a 95 % Student t interval, and behind
it in how many seeds ARM is the better one. Lower is better for what is called forgetting, higher for scores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clplat.errors import ClplatError, nearest
from clplat.metrics import paired
from clplat.study_results import StudyResults, journal_results

LOWER = ("cumulative_forgetting_curve", "cumulative_forgetting_curve_first", "cumulative_forgetting")
HIGHER = ("learning_score", "final_score")


def pairs_of(texts: list[str], study: StudyResults) -> list[tuple[str, str]]:
    """ARM:OTHER as pairs; unknown arms are named."""
    pairs = []
    for text in texts:
        arms = text.split(":")
        if len(arms) != 2:
            sys.exit(f"{text}: write two variants with a colon between them")
        for arm in arms:
            if arm not in study.variants():
                sys.exit(f"{text}: study {study.name} has no runs of {arm!r}{nearest(arm, study.variants())}")
        pairs.append((arms[0], arms[1]))
    return pairs


def contrast(study: StudyResults, arm: str, other: str, metric: str) -> str:
    """`mean ± half, better/seeds`."""
    ours, theirs = study.by_seed(arm, metric), study.by_seed(other, metric)
    seeds = ours.keys() & theirs.keys()
    sign = -1 if metric in LOWER else 1
    better = sum(sign * (ours[seed] - theirs[seed]) > 0 for seed in seeds)
    return f"{paired(ours, theirs)}, {better}/{len(seeds)}"


def lines(study: StudyResults, pairs: list[tuple[str, str]]) -> list[str]:
    metrics = (*LOWER, *HIGHER)
    text = ["| " + " | ".join(["", *(name.replace("_", " ") for name in metrics)]) + " |"]
    text.append("|" + "---|" * (len(metrics) + 1))
    for arm, other in pairs:
        cells = [f"{arm} − {other}", *(contrast(study, arm, other, name) for name in metrics)]
        text.append("| " + " | ".join(cells) + " |")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="ARM:OTHER")
    options = parser.parse_args()
    try:
        study = journal_results(options.study)
    except (ClplatError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print("\n".join(lines(study, pairs_of(options.pairs, study))))


if __name__ == "__main__":
    main()
