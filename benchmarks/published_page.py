"""The table of published numbers beside ours, out of the run folders that `published_rows.py` leaves.

    python benchmarks/published_page.py FOLDER [FOLDER …] docs/results/images.md

Prints the table between two marker lines into the page; what stands outside them is written by hand and kept.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from results_page import BEGIN, END, markdown

from clplat.errors import ClplatError
from clplat.known_good import KnownGood
from clplat.study_file import load_study
from clplat.study_results import journal_results


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published number, and the final scores of the seeds that finished, in per cent."""

    name: str
    entry: KnownGood
    planned: int
    finals: dict[int, float]
    minutes: float
    """Mean minutes of training and evaluation of a seed."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.finals.values()) if self.finals else math.nan

    @property
    def measured(self) -> str:
        """Mean ± standard deviation of the sample."""
        if not self.finals:
            return "–"
        spread = f" ± {statistics.stdev(self.finals.values()):.2f}" if len(self.finals) > 1 else ""
        return f"{self.mean:.2f}{spread}"

    @property
    def verdict(self) -> str:
        """Whether the mean of all seeds that were planned lies within the tolerance."""
        if not self.finals:
            return "not run"
        within = abs(self.mean - self.entry.published) <= self.entry.tolerance
        part = "" if len(self.finals) == self.planned else f", {len(self.finals)} of {self.planned} seeds"
        return ("yes" if within else "**no**") + part


def rows(folders: list[Path]) -> list[Row]:
    """The rows of the studies below the folders, in the order of their names in the shipped studies."""
    from clplat.best import catalogue

    found = {}
    for folder in (study.parent for each in folders for study in each.glob("*/study.yaml")):
        if folder.name in found:
            raise ClplatError(f"{folder}: another folder has this row too; name each row once")
        study, results = load_study(folder / "study.yaml"), journal_results(folder)
        (name, entry), = study.known_good.items()  # fmt: skip
        finals = {seed: 100 * score for seed, score in results.by_seed(entry.variant, "final_score").items()}
        spent = [sum(run.metrics.get(f"cost/{part}_seconds", 0.0) for part in ("training", "evaluation", "boundary"))
                 for run in results.of(entry.variant)]  # fmt: skip
        minutes = statistics.mean(spent) / 60 if spent else math.nan
        found[folder.name] = Row(name=name, entry=entry, planned=len(study.seeds), finals=finals, minutes=minutes)
    return [found[name] for name in catalogue() if name in found]


def table(found: list[Row]) -> str:
    """Every row with its source, its numbers and the command that makes them."""
    heads = ["published row", "n", "here", "published", "here − published", "within", "minutes a seed",
             "`clplat run --best` …"]  # fmt: skip
    lines = [
        [
            row.entry.source, str(len(row.finals)), row.measured,
            f"{row.entry.published:g}" + (" (RECALLED)" if row.entry.recalled else ""),
            f"{row.mean - row.entry.published:+.2f}" if row.finals else "–",
            f"{row.verdict} (±{row.entry.tolerance:g})", f"{row.minutes:.1f}" if row.finals else "–", f"`{row.name}`",
        ]
        for row in found
    ]  # fmt: skip
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    old = options.page.read_text() if options.page.is_file() else f"{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        sys.exit(f"{options.page}: put both marker lines, {BEGIN} and {END}, around its table")
    try:
        found = rows(options.folders)
    except ClplatError as error:
        sys.exit(f"{parser.prog}: {error}")
    before, _, rest = old.partition(BEGIN)
    options.page.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.partition(END)[2]}")
    reproduced = sum(row.verdict == "yes" for row in found)
    print(f"{options.page}: {len(found)} rows, {reproduced} within their tolerance with all their seeds")


if __name__ == "__main__":
    main()
