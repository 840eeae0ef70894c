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
from clplat.report import MEANING, notes, number_table
from clplat.same_stream import seeds_apart, settings_apart, sharing
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
    def shared(self) -> list[list[str]]:
        """Columns of one stream, in groups: with any, columns are not streams, and nothing is said over them."""
        return sharing(self.studies)

    def lacking(self, variant: str) -> list[str]:
        """The studies that have no final score of a variant."""
        return [column for column in self.studies if math.isnan(self.score(variant, column).mean)]

    @cached_property
    def ranked(self) -> list[str]:
        """The variants that every stream has a final score of, but for reference arms; two at least, or none."""
        found = [v for v in self.variants() if not self.is_reference(v) and not self.lacking(v)]
        return [] if self.shared or len(found) < 2 else found

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
        """Mean difference to the baseline over the streams that have it, each as one value; None where there is none or
        streams have different units."""
        gaps = self._gaps(variant)
        return None if self.shared or len(self.units) > 1 or not gaps else interval(gaps)

    def better_in(self, variant: str) -> tuple[int, int]:
        """In how many streams it has a higher mean than the baseline, and of how many that have both."""
        gaps = self._gaps(variant)
        return sum(gap > 0 for gap in gaps), len(gaps)

    def _gaps(self, variant: str) -> list[float]:
        means = [self.difference(variant, column).mean for column in self.studies]
        return [mean for mean in means if not math.isnan(mean)]

    def critical_difference(self) -> tuple[float, float] | str:
        """Nemenyi's critical difference at 5 % and the p of Friedman's test; or why there is none (Demšar 2006)."""
        streams, variants = len(self.studies), len(self.ranked)
        if self.shared:
            return "no critical difference: that needs other streams, not other settings"
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
    """Heads and rows: final score of each variant by stream, and its mean rank where columns are streams."""
    ranks, rows = side.mean_ranks(), []
    for variant in side.variants():
        row = [_name(side, variant), *(str(side.score(variant, column)) for column in side.studies)]
        rows.append(row if side.shared else [*row, f"{ranks[variant]:.2f}" if variant in ranks else "–"])
    return ["variant", *side.studies, *([] if side.shared else ["mean rank"])], rows


def _name(side: SideBySide, variant: str) -> str:
    return f"{variant} †" if side.is_reference(variant) else variant


def difference_rows(side: SideBySide) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: paired differences to the baseline by stream, over streams, and in how many they are above it;
    the last two of those streams that have both."""
    rows = []
    for variant in side.variants():
        if variant == side.baseline:
            continue
        gaps = [side.difference(variant, column) for column in side.studies]
        row = [f"{gap}*" if verdict(gap) == "difference" else str(gap) for gap in gaps]
        if not side.shared:
            better, known = side.better_in(variant)
            row += [str(side.over_streams(variant) or "–"), f"{better} of {known}" if known else "–"]
        rows.append([_name(side, variant), *row])
    return [f"minus {side.baseline}", *side.studies, *([] if side.shared else ["over streams", "better in"])], rows


def side_finding(side: SideBySide) -> str:
    """The result over streams in a few words; of studies of one stream that of each."""
    ranks, none = side.mean_ranks(), "No ranking over streams: "
    if side.shared:
        best = [f"{column}: {_best(study)}" for column, study in side.studies.items()]
        return f"{none}{_said(side.shared)}. Best final score in {'; in '.join(best)}."
    if not ranks:
        return (
            f"{none}that needs two variants, reference arms left out, with a final score in every study{_gone(side)}."
        )
    first = min(ranks, key=lambda variant: ranks[variant])
    text = f"Best mean rank over {len(side.studies)} streams: {first}, {ranks[first]:.2f} of {len(ranks)} variants"
    text += " (reference arms left out)" if any(map(side.is_reference, side.variants())) else ""
    over = side.over_streams(first) if side.baseline not in (None, first) else None
    if over is not None:
        better, known = side.better_in(first)
        text += (f"; its final score is {over} above {side.baseline} (a stream is one value; better in {better} of "
                 f"{known}): {MEANING[verdict(over)].replace('seeds', 'streams')}")  # fmt: skip
    found = side.critical_difference()
    if isinstance(found, tuple):
        worse = [v for v in ranks if ranks[v] - ranks[first] > found[0]]
        against = f"it is better than {', '.join(worse)}" if worse and found[1] < 0.05 else "no variant is told from it"
        text += f". By the critical difference of {found[0]:.2f} ranks (Friedman p = {found[1]:.2g}) {against}"
    return text + "."


def _best(study: StudyResults) -> str:
    arms = [v for v in study.variants() if not study.is_reference(v) and study.by_seed(v, "final_score")]
    best = max(arms, key=lambda v: study.interval(v, "final_score").mean, default=None)
    return "none yet" if best is None else f"{best}, {study.interval(best, 'final_score')}"


def _said(shared: Sequence[Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(group)} are of one stream" for group in shared)


def _gone(side: SideBySide) -> str:
    """Which variants have no final score in which studies, reference arms left out."""
    gone: dict[str, list[str]] = {}
    for variant in side.variants():
        if not side.is_reference(variant) and (lacks := side.lacking(variant)):
            gone.setdefault(", ".join(lacks), []).append(variant)
    return "".join(f"; {columns} has none of {', '.join(variants)}" if ", " not in columns else
                   f"; {columns} have none of {', '.join(variants)}" for columns, variants in gone.items())  # fmt: skip


def side_notes(side: SideBySide) -> list[str]:
    """What to know before believing it: of the whole, and of each study what its own comparison says."""
    found = []
    for group in side.shared:
        studies = {column: side.studies[column] for column in group}
        apart = "; ".join(filter(None, [settings_apart(studies), seeds_apart(studies.values())]))
        apart = apart or "nothing that is recorded"
        found.append(f"{', '.join(group)} have the same stream with the same options and data, so that there is no "
                     f"mean rank and no interval over streams; they differ in {apart}")  # fmt: skip
    if side.ranked and (gone := _gone(side)):
        found.append(f"not ranked, since not in every stream{gone.replace(';', ':', 1)}")
    if side.baseline is None:
        found.append("no differences: the studies have no common baseline; name one with --baseline")
    elif len(side.units) > 1:
        found.append(f"no mean of differences over streams: they are scored by {', '.join(side.units)}")
    if not side.shared and isinstance(none := side.critical_difference(), str):
        found.append(none)
    return found + [f"{column}: {note}" for column, study in side.studies.items()
                    for note in notes(study, side.baseline or study.baseline)]  # fmt: skip


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
