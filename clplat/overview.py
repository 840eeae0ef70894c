"""Looking around: what there is to choose from, what a configuration resolves to, what this machine has."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from clplat.components import WINGS, catalogue
from clplat.errors import ConfigError, nearest
from clplat.machine import cores
from clplat.study_file import shipped_folder

if TYPE_CHECKING:
    import pandas

PLURALS = {
    "streams": "stream",
    "architectures": "architecture",
    "layers": "layer",
    "strategies": "strategy",
    "optimizers": "optimizer",
}


def listed(what: str | None) -> list[Table]:
    """Tables of components (name, one line, paper) and of shipped studies."""
    words = [*PLURALS, "studies"]
    if what is not None and what not in words:
        raise ConfigError(f"list: there is no list of {what!r}{nearest(what, words)}")
    tables = []
    for word in [what] if what else words:
        columns = ("what it is for",) if word == "studies" else ("what it is for", "paper")
        title = "studies: clplat run NAME" if word == "studies" else word
        table = Table(Column("name", no_wrap=True), *columns, title=title)
        for row in _studies() if word == "studies" else _components(PLURALS[word]):
            table.add_row(*row)
        tables.append(table)
    return tables


def _components(wing: str) -> list[tuple[str, str, str]]:
    rows = [(entry.name, entry.line, entry.paper) for _, entry in sorted(catalogue(wing).items())]
    if wing == "optimizer":
        rows.append(("torch.optim.*", "any optimizer of torch by its name, for example AdamW or SGD", ""))
    return rows


def _studies() -> list[tuple[str, str]]:
    folder = shipped_folder()
    rows = []
    for file in sorted(folder.rglob("*.yaml")):
        name = str(file.relative_to(folder).with_suffix(""))
        first = file.read_text().splitlines()[0]
        rows.append((name, first.lstrip("# ") if first.startswith("#") else ""))
    return rows


def shown_frame(frame: pandas.DataFrame, title: str) -> Table:
    """A data frame for the terminal."""
    table = Table(*frame.columns, title=title, title_justify="left")
    for row in frame.itertuples(index=False):
        words = ({True: "yes", False: "no"}[v] if isinstance(v, bool) else v for v in row)
        table.add_row(*(f"{word:.6g}" if isinstance(word, float) else str(word) for word in words))
    return table


def shown(config: str, overrides: Sequence[tuple[str, str]]) -> str:
    """A study with every default filled in, and each variant's full configuration, as YAML."""
    import yaml

    from clplat.config import StudyConfig, parse, plain
    from clplat.study_file import expand, load_study

    study = load_study(config, overrides)
    runs = {run.variant: run for run in expand(study)}
    base = plain(study) | {"variants": {}, "baseline": None}
    shared = plain(expand(parse(StudyConfig, base))[0])
    whole = plain(study) | {name: shared[name] for name in ("stream", "architecture", "training")}
    whole |= {"variants": {name: plain(run) for name, run in runs.items()}}
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)


def examined() -> tuple[Table, bool]:
    """Versions, devices, Triton and caches; whether everything that clplat depends on is there."""
    import torch

    from clplat.record import PACKAGES

    table = Table("what", "found", title="clplat doctor")
    table.add_row("python", sys.version.split()[0])
    healthy = True
    for package in PACKAGES:
        try:
            table.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            healthy = healthy and package == "triton" and sys.platform != "linux"
            table.add_row(package, Text("missing", "red").append(f": pip install {package}", "default"))
    table.add_row("cores", str(cores()))
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none; everything runs on the CPU")
    table.add_row("Triton kernels", _triton(bool(gpus)))
    cache = Path(os.environ.get("CLPLAT_CACHE", Path.home() / ".cache" / "clplat"))
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0
    table.add_row("token cache", f"{cache} ({size / 2**20:.1f} MiB)")
    table.add_row("free disk here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB")
    table.add_row("wings", ", ".join(f"{len(catalogue(wing))} {plural}" for plural, wing in PLURALS.items()))
    assert set(PLURALS.values()) == set(WINGS)
    return table, healthy


def _triton(gpu: bool) -> str:
    if gpu:
        return "compiled for the GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreted (TRITON_INTERPRET=1)"
    return "not used without a GPU; the chunked PyTorch forms are"
