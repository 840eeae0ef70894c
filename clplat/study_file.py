"""Study files: found, read, overridden from the command line, and expanded into one configuration a run."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clplat.components import checked
from clplat.config import Experiment, RunConfig, StudyConfig, difference, load_run, parse, plain
from clplat.errors import ConfigError, nearest
from clplat.launchers.options import check_launcher
from clplat.ranges import check_least, check_numbers
from clplat.streams.budget import BUDGET_UNITS
from clplat.tuning.options import TUNE_FILE
from clplat.yaml_text import parse_yaml


def find(config: str | Path) -> Path:
    """The file that a configuration argument means: a path, or the name of a shipped study."""
    path = Path(config)
    if path.is_file():
        return path
    shipped = shipped_folder()
    named = shipped / f"{config}.yaml"
    if named.is_file():
        return named
    if path.is_dir():
        raise ConfigError(f"configuration {str(config)!r}: is {_kind_of(path)}")
    names = [str(file.relative_to(shipped).with_suffix("")) for file in shipped.rglob("*.yaml")]
    raise ConfigError(
        f"configuration {str(config)!r}: no such file, and no shipped study has this name{nearest(str(config), names)}"
    )


def _kind_of(folder: Path) -> str:
    """What a folder is that was given in place of a configuration, and what can be done with it."""
    for name, kind in ((TUNE_FILE, "a tune's folder"), ("study.yaml", "a study's folder"), ("config.yaml", "a run's")):
        if (folder / name).is_file():
            return f"{kind}; `clplat resume {folder}` goes on with it, and its {name} is the configuration"
    return "a folder; name a file in it, or a shipped study (`clplat list studies`)"


def shipped_folder() -> Path:
    """Where the studies that come with clplat lie."""
    from clplat import configs

    return Path(configs.__path__[0])


def load_study(config: str | Path | Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> StudyConfig:
    """The study that a file, a shipped name or plain data describes, with dotted overrides applied."""
    if isinstance(config, Mapping):
        data = json.loads(json.dumps(config))
    else:
        try:
            data = parse_yaml(find(config).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{config}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{config}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{config}: a study is a mapping with the keys name, stream, architecture, …")
    for key, text in overrides:
        try:
            value = parse_yaml(text)
            # A variant may be called `off`, which YAML takes for false.
            named = key in ("variants", "baseline") and isinstance(value, bool)
            _override(data, key, text if named else value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: {text!r} is not valid YAML") from error
    study = parse(StudyConfig, data)
    check_numbers(study)
    check_launcher(study.launcher)
    check_least("seeds", min(study.seeds, default=0), 0)
    _check_names(study)
    return study


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, or choose among variants: `variants a,b` keeps those alone, `variants.a null` leaves one out."""
    variants = data.get("variants") or {}
    if key == "variants" and isinstance(value, str | list):
        _keep_variants(data, value.split(",") if isinstance(value, str) else value)
    elif value is None and (name := key.removeprefix("variants.")) in variants and name != key:
        _keep_variants(data, [one for one in variants if one != name])
    elif written := next((one for one in data.get("space") or {} if f"{key}.".startswith(f"space.{one}.")), None):
        # A dotted key stands in the file as one word: what is given for all of it takes its place.
        inner = key.removeprefix(f"space.{written}").removeprefix(".")
        data["space"] = data["space"] | {written: _with_key(data["space"][written], inner, value)}
    else:
        set_key(data, key, value)


def _with_key(data: Any, key: str, value: Any) -> Any:
    if not key:
        return value
    found = {"data": data}
    set_key(found, f"data.{key}", value)
    return found["data"]


def _keep_variants(data: dict[str, Any], names: Sequence[str]) -> None:
    """Keep some variants alone; what refers to the others goes with them."""
    variants, known_good = data.get("variants") or {}, data.get("known_good") or {}
    for name in names:
        if name not in variants:
            raise ConfigError(f"--variants: no variant is called {name!r}{nearest(str(name), variants)}")
    data["variants"] = {name: variants[name] for name in names}
    data["known_good"] = {name: entry for name, entry in known_good.items() if entry.get("variant") in names}
    if data.get("baseline") not in names:
        if data.get("baseline") is not None:
            print(
                f"--variants leaves out the baseline {data['baseline']!r}: nothing is compared with it", file=sys.stderr
            )
        data["baseline"] = None


def chosen(study: StudyConfig, variant: str | None, seed: int | None) -> StudyConfig:
    """One of the study's variants alone, and one of its seeds; None leaves all of them."""
    if variant is not None:
        if variant not in study.variants:
            raise ConfigError(f"--variant: no variant is called {variant!r}{nearest(variant, study.variants)}")
        known_good = {name: one for name, one in study.known_good.items() if one.variant == variant}
        baseline = variant if study.baseline == variant else None
        alone = {variant: study.variants[variant]}
        study = dataclasses.replace(study, variants=alone, baseline=baseline, known_good=known_good)
    if seed is None:
        return study
    if seed not in study.seeds:
        among = ", ".join(map(str, study.seeds))
        raise ConfigError(f"--seed: {seed} is none of the study's seeds ({among}); --seeds '[{seed}]' runs another")
    return dataclasses.replace(study, seeds=[seed])


def _check_names(study: StudyConfig) -> None:
    """Refuse names that cannot be those of folders, and references to variants that are not there."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", study.name):
        raise ConfigError(f"name: use up to 100 letters, digits, '_', '-', '+' and '.'; got {study.name!r}")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(f"seeds: give at least one, each once; got {study.seeds}")
    for name, known in study.known_good.items():
        if known.variant not in study.variants:
            raise ConfigError(f"known_good.{name}.variant: no variant is called {known.variant!r}"
                              f"{nearest(known.variant, study.variants)}")  # fmt: skip
    if study.baseline is not None and study.baseline not in study.variants:
        raise ConfigError(f"baseline: no variant is called {study.baseline!r}{nearest(study.baseline, study.variants)}")


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` (numbers index lists) in nested plain data, making mappings on the way."""
    *path, last = key.split(".")
    place: Any = data
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if path[-1:] == ["budget"] and last in BUDGET_UNITS:
            # Naming one unit means this one instead of the study's.
            for unit in BUDGET_UNITS:
                place.pop(unit, None)
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--{key}: there is no such place in the configuration ({error})") from error


def expand(study: StudyConfig) -> list[RunConfig]:
    """The runs of a study in the order variant, seed; every component checked."""
    shared = {f.name: plain(getattr(study, f.name)) for f in dataclasses.fields(Experiment)}
    runs = []
    for variant, changes in (study.variants or {study.name: {}}).items():
        if not re.fullmatch(r"[\w.+-]{1,100}", variant):
            raise ConfigError(
                f"variants.{variant}: use up to 100 letters, digits, '_', '-', '+' and '.' in a variant's name"
            )
        key = f"variants.{variant}." if study.variants else ""
        try:
            merged = merge(shared, changes or {})
            run = parse(RunConfig, merged | {"study": study.name, "variant": variant, "seed": study.seeds[0]})
            check_numbers(run)
            run = with_checked_components(run)
        except ConfigError as error:
            # What all variants share was not written under one of them.
            mine = str(error).partition(".")[0].partition(":")[0] in (changes or {})
            raise ConfigError(f"{key if mine else ''}{error}") from error
        runs += [dataclasses.replace(run, seed=seed) for seed in study.seeds]
    return runs


def with_checked_components(run: RunConfig) -> RunConfig:
    """The run with all options of its components written out: those that are not there have their defaults."""
    return dataclasses.replace(
        run,
        stream=checked(run.stream, "stream", "stream"),
        architecture=checked(run.architecture, "architecture", "architecture"),
        strategies={n: checked(c, "strategy", f"strategies.{n}") for n, c in run.strategies.items()},
        training=dataclasses.replace(
            run.training, optimizer=checked(run.training.optimizer, "optimizer", "training.optimizer")
        ),
    )


def merge(base: Any, changes: Any) -> Any:
    """`base` with `changes` laid over it; another class_path drops the old init_args, null removes a key."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    other_class = "class_path" in changes and changes["class_path"] != base.get("class_path")
    other_budget = changes.keys() & set(BUDGET_UNITS) and "until" in base
    result = {} if other_class or other_budget else dict(base)
    for key, value in changes.items():
        if value is None and isinstance(base.get(key), dict):
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def check_unchanged(folder: Path, runs: Sequence[Path]) -> None:
    """Refuse run folders of the study in `folder` whose config.yaml is another experiment than study.yaml says.

    One that has checkpoints and no journal any more would end without a result: it is refused too.
    """
    planned = {(run.variant, run.seed): run for run in expand(load_study(folder / "study.yaml"))}
    for run in runs:
        # What was written before an option existed has that option's default.
        config = with_checked_components(load_run(run / "config.yaml"))
        study = planned.get((config.variant, config.seed))
        changed = difference(study, config) if study is not None else ["variant and seed are not in study.yaml"]
        if changed:
            raise ConfigError(
                f"{run / 'config.yaml'}: is not what study.yaml says ({'; '.join(changed)}); undo the change, or "
                "start a new study with it"
            )
        if any(run.glob("checkpoints/*.pt")) and not (run / "journal.jsonl").is_file():
            raise ConfigError(
                f"{run}: its journal.jsonl is gone, and with it what was measured; remove the folder, and "
                f"`clplat resume {folder}` runs it anew"
            )


def record_name(folder: Path) -> str:
    """What a study is called in MLflow: by its folder, and the report of a tune by that of the tune too, since the
    folders of two reports may have one name."""
    folder = folder.absolute()
    return f"{folder.parent.name}-{folder.name}" if (folder.parent / TUNE_FILE).is_file() else folder.name


def run_folders(folder: Path) -> list[Path]:
    """The run folders of a study folder, in the order of its variants and seeds."""
    study = load_study(folder / "study.yaml")
    names = [f"{variant}-s{seed}" for variant in (study.variants or {study.name: {}}) for seed in study.seeds]
    return [folder / name for name in names if (folder / name / "config.yaml").is_file()]
