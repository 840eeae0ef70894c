"""Which of several studies are of one stream: those are repetitions or other settings, and no streams to rank over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clplat.study_results import RunRecord, StudyResults

SET_ASIDE = ("study", "variant", "seed", "tracking.", "checkpoint.", "launcher.")
"""Parameters that make no other experiment."""


def sharing(studies: Mapping[str, StudyResults]) -> list[list[str]]:
    """The columns that share a stream, in groups of two and more; one whose stream no run has told of is in none."""
    groups: list[list[str]] = []
    for column, study in studies.items():
        group = next((g for g in groups if _same(studies[g[0]], study)), None)
        if group is None:
            groups.append([column])
        else:
            group.append(column)
    return [group for group in groups if len(group) > 1]


def _same(one: StudyResults, other: StudyResults) -> bool:
    """Whether their streams are of one class with the same options and, where both have a seed, the same data."""
    ours, theirs = _options(one), _options(other)
    if not ours or ours != theirs:
        return False
    data, known = _data(one), _data(other)
    return all(data[seed] == known[seed] for seed in data.keys() & known.keys())


def _options(study: StudyResults) -> set[tuple[tuple[str, str], ...]]:
    """Class and options of the stream of each variant; `tasks` cuts it."""
    found = (
        tuple(sorted((k, v) for k, v in run.params.items() if k.startswith("stream.") or k == "tasks"))
        for run in study.runs
    )
    return {options for options in found if options}


def _data(study: StudyResults) -> dict[int, frozenset[tuple[str, str]]]:
    """Digests of the data by seed."""
    return {run.seed: frozenset(run.data.items()) for run in study.runs if run.data}


def settings_apart(studies: Mapping[str, StudyResults]) -> str:
    """What else the studies were configured with, by the variants that all have: `key: value, value`, at most five.
    Where no variant is in all of them, by what each study has in all of its variants."""
    firsts = [_first_runs(study) for study in studies.values()]
    shared = [variant for variant in firsts[0] if all(variant in first for first in firsts)]
    sides = [[first[variant].params for first in firsts] for variant in shared] or [
        [_common(first) for first in firsts]
    ]
    found: dict[str, list[str]] = {}
    for params in sides:
        for key in dict.fromkeys(key for one in params for key in one if not key.startswith(SET_ASIDE)):
            values = [one.get(key, "none") for one in params]
            if len(set(values)) > 1:
                found.setdefault(key, values)
    return "; ".join(f"{key}: {', '.join(values)}" for key, values in list(found.items())[:5])


def seeds_apart(studies: Iterable[StudyResults]) -> str:
    """The seeds of each study, where they are not the same."""
    seeds = [sorted({run.seed for run in study.runs}) for study in studies]
    return "" if all(each == seeds[0] for each in seeds) else f"seeds: {' and '.join(map(str, seeds))}"


def _common(firsts: Mapping[str, RunRecord]) -> dict[str, str]:
    """The parameters that are alike in all variants of a study."""
    first, *others = [run.params for run in firsts.values()] or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _first_runs(study: StudyResults) -> dict[str, RunRecord]:
    found: dict[str, RunRecord] = {}
    for run in study.runs:
        if run.params:
            found.setdefault(run.variant, run)
    return found
