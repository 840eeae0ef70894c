"""Several studies of the same variants, a column for each stream: scores, paired differences, mean ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from rich.console import Group

from clplat.errors import ConfigError, nearest
from clplat.metrics import Interval, differences, interval, verdict
from clplat.report import MEANING, number_table
from clplat.study_results import StudyResults

FEWEST = 5
"""Streams below which no critical difference is given: Nemenyi's test could hardly find any then."""


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Studies by the names of their columns; `baseline` is in all of them, None where they have no common one."""

    studies: dict[str, StudyResults]
    baseline: str | None

    def variants(self) -> list[str]:
        """The variants of all studies, in the order in which they first come."""
        return list(dict.fromkeys(v for study in self.studies.values() for v in study.variants()))

    def is_reference(self, variant: str) -> bool:
        """Whether any of the studies has it as a reference arm."""
        return any(study.is_reference(variant) for study in self.studies.values())

    def score(self, variant: str, column: str) -> Interval:
        """Final score over the seeds of a stream."""
        return self.studies[column].interval(variant, "final_score")

    def by_seed(self, variant: str, column: str) -> dict[int, float]:
        """Final score minus the baseline's, seed by seed."""
        assert self.baseline is not None
        ours, base = (self.studies[column].by_seed(v, "final_score") for v in (variant, self.baseline))
        return differences(ours, base)

    def difference(self, variant: str, column: str) -> Interval:
        """The interval of those."""
        return interval(list(self.by_seed(variant, column).values()))

    @cached_property
    def ranked(self) -> list[str]:
        """The variants that every stream has a final score of, but for reference arms."""
        return [v for v in self.variants() if not self.is_reference(v)
                and not any(math.isnan(self.score(v, column).mean) for column in self.studies)]  # fmt: skip

    @cached_property
    def _ranks(self) -> np.ndarray:
        """(streams, ranked): 1 is the best mean final score of a stream; equals share their ranks."""
        from scipy.stats import rankdata

        means = np.array([[self.score(v, column).mean for v in self.ranked] for column in self.studies])
        return rankdata(-means, axis=1)

    def mean_ranks(self) -> dict[str, float]:
        """Mean rank over streams of each of `ranked`."""
        return dict(zip(self.ranked, self._ranks.mean(0).tolist(), strict=True)) if self.ranked else {}

    @cached_property
    def units(self) -> list[str]:
        """What the streams are scored by."""
        # One run of each: its table is read from the server, and all runs of a study are scored alike.
        tables = [next(filter(None, (run.table for v in study.variants() for run in study.of(v))), None)
                  for study in self.studies.values()]  # fmt: skip
        cells = [cell for table in filter(None, tables) for cell in table.cells(table.rows()[-1])]
        return sorted({cell.metric for cell in cells if cell.headline})

    def over_streams(self, variant: str) -> Interval | None:
        """Mean difference to the baseline, a stream as one value; None where streams have different units or it is not
        in all of them."""
        gaps = [self.difference(variant, column).mean for column in self.studies]
        return None if len(self.units) > 1 or any(map(math.isnan, gaps)) else interval(gaps)

    def better_in(self, variant: str) -> int:
        """The streams in which it has the higher mean."""
        return sum(self.difference(variant, column).mean > 0 for column in self.studies)

    def critical_difference(self) -> tuple[float, float] | str:
        """Nemenyi's critical difference at 5 % and the p of Friedman's test; or why there is none (Demšar 2006)."""
        streams, variants = len(self.studies), len(self.ranked)
        if streams < FEWEST:
            return f"no critical difference: that needs at least {FEWEST} streams, and these are {streams}"
        if variants < 3:
            return "no critical difference: that needs at least 3 variants that every stream has"
        from scipy.stats import friedmanchisquare, studentized_range

        # q at infinite degrees of freedom, as the paper's table 5 has it; of 10^5 the difference is below 1e-4.
        q = studentized_range.ppf(0.95, variants, 1e5) / math.sqrt(2)
        columns = [self._ranks[:, place] for place in range(variants)]
        same = bool((self._ranks == self._ranks[0, 0]).all())
        p = 1.0 if same else float(friedmanchisquare(*columns).pvalue)
        return float(q * math.sqrt(variants * (variants + 1) / (6 * streams))), p


def side_by_side(studies: Sequence[StudyResults], baseline: str | None = None) -> SideBySide:
    """Studies as columns, named by their stream where that tells them apart, else by study, else by folder."""
    if len({study.run_id or study.folder for study in studies}) < len(studies):
        raise ConfigError("compare: a study is named twice; several studies are compared stream by stream")
    ways = (lambda s: " or ".join(s.tag_values("stream")), lambda s: s.name, lambda s: s.folder.rpartition("/")[2])
    told = ([way(study) for study in studies] for way in ways)
    names = next((one for one in told if len(set(one)) == len(studies)), None)
    columns = dict(zip(names or [f"study {n + 1}" for n in range(len(studies))], studies, strict=True))
    found = SideBySide(studies=columns, baseline=baseline or _common_baseline(studies))
    for name, study in columns.items():
        if found.baseline is not None and found.baseline not in study.variants():
            raise ConfigError(
                f"baseline: {name} has no variant {found.baseline!r}{nearest(found.baseline, study.variants())}"
            )
    return found


def _common_baseline(studies: Sequence[StudyResults]) -> str | None:
    bases = {study.baseline for study in studies}
    return next(iter(bases)) if len(bases) == 1 else None


def score_rows(side: SideBySide) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: final score of each variant by stream, and its mean rank."""
    ranks = side.mean_ranks()
    rows = []
    for variant in side.variants():
        rank = f"{ranks[variant]:.2f}" if variant in ranks else "–"
        rows.append(
            [
                f"{variant} †" if side.is_reference(variant) else variant,
                *(str(side.score(variant, column)) for column in side.studies),
                rank,
            ]
        )
    return ["variant", *side.studies, "mean rank"], rows


def difference_rows(side: SideBySide) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: paired differences to the baseline by stream, over streams, and in how many they are above it."""
    rows = []
    for variant in side.variants():
        if variant == side.baseline:
            continue
        gaps = [side.difference(variant, column) for column in side.studies]
        shown = [f"{gap}*" if verdict(gap) == "difference" else str(gap) for gap in gaps]
        whole = side.over_streams(variant)
        rows.append(
            [
                f"{variant} †" if side.is_reference(variant) else variant,
                *shown,
                str(whole or "–"),
                f"{side.better_in(variant)} of {len(gaps)}",
            ]
        )
    return [f"minus {side.baseline}", *side.studies, "over streams", "better in"], rows


def side_finding(side: SideBySide) -> str:
    """The result over streams in a few words."""
    ranks = side.mean_ranks()
    if not ranks:
        return "No variant has a final score in every stream."
    best = min(ranks, key=lambda variant: ranks[variant])
    text = f"Best mean rank over {len(side.studies)} streams: {best}, {ranks[best]:.2f} of {len(ranks)} variants"
    text += " (reference arms left out)" if any(map(side.is_reference, side.variants())) else ""
    over = side.over_streams(best) if side.baseline not in (None, best) else None
    if over is not None:
        text += (f"; its final score is {over} above {side.baseline} (a stream is one value; better in "
                 f"{side.better_in(best)}): {MEANING[verdict(over)].replace('seeds', 'streams')}")  # fmt: skip
    found = side.critical_difference()
    if isinstance(found, tuple):
        worse = [v for v in ranks if ranks[v] - ranks[best] > found[0]]
        against = f"it is better than {', '.join(worse)}" if worse and found[1] < 0.05 else "no variant is told from it"
        text += f". By the critical difference of {found[0]:.2f} ranks (Friedman p = {found[1]:.2g}) {against}"
    return text + "."


def side_notes(side: SideBySide) -> list[str]:
    """What to know before believing it."""
    found = []
    partly = [v for v in side.variants() if v not in side.ranked and not side.is_reference(v)]
    if partly:
        found.append(f"not in every stream, and so not ranked: {', '.join(partly)}")
    if side.baseline is None:
        found.append("no differences: the studies have no common baseline; name one with --baseline")
    elif len(side.units) > 1:
        found.append(f"no mean of differences over streams: they are scored by {', '.join(side.units)}")
    none = side.critical_difference()
    return found + ([none] if isinstance(none, str) else [])


def side_table(side: SideBySide) -> Group:
    """The comparison for a terminal."""
    tables = []
    for title, (heads, rows) in {
        "final score: mean ± 95 % interval over seeds": score_rows(side),
        f"final score − {side.baseline}, paired over seeds": difference_rows(side) if side.baseline else ([], []),
    }.items():
        if rows:
            tables.append(number_table(title, heads[1:], first=heads[0]))
            for row in rows:
                tables[-1].add_row(*row)
    if any(map(side.is_reference, side.variants())):
        tables[0].caption = "† reference arm, not ranked."
    return Group(*tables, *(f"note: {note}" for note in side_notes(side)), side_finding(side))
