"""Settings that are known to work: by name one variant of a shipped study, what was published, and what it reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Column, Table

from clplat.config import StudyConfig, parse
from clplat.errors import ConfigError, nearest
from clplat.known_good import KnownGood
from clplat.study_file import load_study, shipped_folder
from clplat.yaml_text import parse_yaml


def catalogue() -> dict[str, tuple[Path, KnownGood]]:
    """Every name with the study's file and its entry, in the order of the files."""
    found: dict[str, tuple[Path, KnownGood]] = {}
    for file in sorted(shipped_folder().rglob("*.yaml")):
        for name, entry in (parse_yaml(file.read_text(encoding="utf-8")).get("known_good") or {}).items():
            if name in found:
                raise ConfigError(f"{file}: known_good.{name}: {found[name][0]} has this name too")
            found[name] = (file, parse(KnownGood, entry))
    return found


def study(name: str, overrides: Sequence[tuple[str, str]] = ()) -> StudyConfig:
    """The study of this name: its one variant with all its seeds; dotted overrides as for any study."""
    known = catalogue()
    if name not in known:
        raise ConfigError(f"--best: nothing is called {name!r}{nearest(name, known)}")
    file, entry = known[name]
    whole = load_study(file, overrides)
    if entry.variant not in whole.variants:
        raise ConfigError(f"--variants: --best {name} runs the variant {entry.variant!r}, which it leaves out")
    alone = {entry.variant: whole.variants[entry.variant]}
    return dataclasses.replace(whole, name=name, variants=alone, baseline=None, known_good={name: entry})


def listed() -> Table:
    """The names, what they reach, and what one seed takes."""
    table = Table(
        Column("name", no_wrap=True), "here", "published", "source", "min",
        title="known-good settings: clplat run --best NAME",
        caption="Final score in %; minutes of one seed. here: mean ± standard deviation over seeds "
        "(docs/results/images.md), – where none was run yet. RECALLED: the published number was not read in "
        "its source.",
    )  # fmt: skip
    for name, (_, entry) in catalogue().items():
        source = f"{entry.source} (RECALLED)" if entry.recalled else entry.source
        table.add_row(name, entry.measured or "–", f"{entry.published:g}", source, f"{entry.minutes:g}")
    return table
