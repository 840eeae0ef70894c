"""clplat from Python: the same as the command line, with values returned.

import clplat
study = clplat.run("quickstart")            # or a path, or a dict
frame = clplat.results(study)               # pandas.DataFrame, one row a score
model = clplat.load_model(study.folder / "er-s0")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from clplat.config import RunConfig, difference, load_run, parse, plain, save
from clplat.errors import ConfigError, StudyFailedError
from clplat.one_run import resume_one
from clplat.plan import check_data, check_plan
from clplat.storage import writing
from clplat.study import Study, carry_out, lay_out_runs, run_study, settled
from clplat.study_file import expand, load_study, run_folders, set_key
from clplat.terminal import terminal
from clplat.tuning.options import TUNE_FILE

if TYPE_CHECKING:
    import pandas

    from clplat.architectures.base import Architecture
    from clplat.tuning.outcome import Tuned

Config = str | Path | Mapping[str, Any]


def run(config: Config, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False) -> Study:
    """Carry out a study (a file, a shipped name, or plain data), with dotted keys overridden.

    Returns the study with its folder, its `status` and an outcome for each run. Raises `ConfigError` before anything is
    trained, and `StudyFailedError` when not one run came to its end and all failed.
    """
    pairs = [(key, json.dumps(value)) for key, value in (overrides or {}).items()]
    study = run_study(load_study(config, pairs), terminal(quiet=quiet))
    if all(outcome.status == "FAILED" for outcome in study.outcomes):
        first = study.outcomes[0]
        raise StudyFailedError(f"{study.folder}: every run failed; {first.folder.name}: {first.reason}")
    return study


def tune(config: Config, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False) -> Tuned:
    """Search the `space` of a configuration, and run default and best settings on what the search has not seen.

    Returns trials, best settings and gain, with the folder of all of them. Raises `ConfigError` before the first trial,
    and `StudyFailedError` when no trial came to its end.
    """
    from clplat.tuning.checks import load_tune
    from clplat.tuning.tune import run_tune

    pairs = [(key, json.dumps(value)) for key, value in (overrides or {}).items()]
    return run_tune(load_tune(config, pairs), terminal(quiet=quiet))


def resume(
    target: str | Path, overrides: Sequence[tuple[str, str]] = (), console: Console | None = None
) -> Study | Tuned:
    """Continue a run, a study or a tune from its last checkpoints.

    `overrides` may change what results do not depend on (devices, workers, tracking); anything else is refused.
    """
    from clplat.journal import ENDED, last_status

    console = console or terminal()
    folder = Path(target) if (Path(target) / TUNE_FILE).is_file() else folder_of(target)
    if (folder / TUNE_FILE).is_file():
        from clplat.tuning.tune import resume_tune

        return resume_tune(folder, overrides, console)
    if (folder / "study.yaml").is_file():
        check_plan(folder, load_study(folder / "study.yaml"))
        _change_runs(folder, overrides)
        study = settled(load_study(folder / "study.yaml", overrides))
        with writing(folder):
            for sentence in lay_out_runs(folder, expand(study)):
                console.print(sentence, soft_wrap=True)
        if any(last_status(run) not in ENDED for run in run_folders(folder)):
            check_data(folder)
        with writing(folder):
            save(study, folder / "study.yaml")
        return carry_out(folder, study, console)
    _change(folder, overrides)
    return resume_one(folder, console)


def _change_runs(folder: Path, overrides: Sequence[tuple[str, str]]) -> None:
    """Lay overrides over all runs of a study; what only the study has is checked here."""
    for key, _ in overrides:
        if key.split(".")[0] in ("name", "seeds", "variants", "folder"):
            raise ConfigError(f"--{key}: a resumed study keeps its runs; start a new study with the change")
    shared = [pair for pair in overrides if pair[0].split(".")[0] not in ("launcher", "baseline")]
    for run in run_folders(folder):
        _change(run, shared)


def _change(folder: Path, overrides: Sequence[tuple[str, str]]) -> None:
    """Lay overrides over a run's configuration, refusing those that would change its result."""
    if not overrides:
        return
    from clplat.yaml_text import parse_yaml

    old = load_run(folder / "config.yaml")
    data = plain(old)
    for key, text in overrides:
        set_key(data, key, parse_yaml(text))
    new = parse(RunConfig, data)
    changed = difference(old, new)
    if changed:
        raise ConfigError(
            f"{folder}: a resumed run must stay the same experiment, and this would change {'; '.join(changed)}. "
            "Devices, workers, checkpoint and tracking settings may change; for the rest start a new study."
        )
    with writing(folder):
        save(settled(new), folder / "config.yaml")


def folder_of(target: str | Path) -> Path:
    """The folder of a run or study: a path, or an MLflow run id whose folder is on this machine."""
    path = Path(target)
    if (path / "config.yaml").is_file() or (path / "study.yaml").is_file():
        return path
    if path.exists():
        raise ConfigError(f"{target}: neither a run folder (config.yaml) nor a study folder (study.yaml)")
    if (path.parent / "study.yaml").is_file():
        raise ConfigError(
            f"{target}: there is no such run folder; `clplat resume {path.parent}` makes one that is gone"
        )
    from clplat.study_record import folder_of_run

    found = folder_of_run(str(target))
    if found is None or not found.is_dir():
        raise ConfigError(f"{target!r}: no such folder, and MLflow knows no run of this id with a folder here")
    return found


def results(study: Study | str | Path, uri: str | None = None) -> pandas.DataFrame:
    """All scores of a study, read from MLflow: one row for each variant, seed, row, view, metric and task."""
    from clplat.study_results import load_study_results, results_frame

    name = str(study.folder) if isinstance(study, Study) else str(study)
    return results_frame(load_study_results(name, uri))


def run_folder_of(run: str | Path) -> Path:
    """The folder of one run; a study's folder is refused with the runs to choose from."""
    folder = folder_of(run)
    if not (folder / "config.yaml").is_file():
        names = ", ".join(one.name for one in run_folders(folder))
        raise ConfigError(f"{run}: is a study; name one of its runs: {names}")
    return folder


def load_model(run: str | Path, uri: str | None = None) -> Architecture:
    """The architecture of a run with its last saved weights, in evaluation mode, on the CPU.

    Of a run folder or run id, or of a registered model, `models:/NAME/VERSION`, at `uri` (default: as for studies).
    """
    if str(run).startswith("models:/"):
        from clplat import registry
        from clplat.study_record import default_uri

        return registry.load(str(run), uri or default_uri())
    from clplat.assembly import built_architecture, load_weights, prepared_stream
    from clplat.checkpoint import Checkpoints

    folder = run_folder_of(run)
    config = load_run(folder / "config.yaml")
    state = Checkpoints(folder, every_seconds=0).load()
    if state is None:
        raise ConfigError(f"{folder}: no checkpoint yet; `clplat resume {folder}` trains it")
    architecture = built_architecture(config, prepared_stream(config))
    load_weights(architecture, state, config.training.precision)
    return architecture.eval()


def evaluate(run: str | Path, stream: str | None = None) -> pandas.DataFrame:
    """Score a run's last weights on a stream: its own, or a class name or YAML of class_path and init_args.

    Returns one row for each task, view and metric, with the `count` of what was averaged.
    """
    import dataclasses

    from clplat.assembly import assemble, load_weights
    from clplat.checkpoint import Checkpoints
    from clplat.components import Component, checked
    from clplat.strategies.world import World
    from clplat.yaml_text import parse_yaml

    folder = run_folder_of(run)
    config = load_run(folder / "config.yaml")
    if stream is not None:
        given = parse_yaml(stream)
        component = Component(**given) if isinstance(given, dict) else Component(class_path=str(given))
        config = dataclasses.replace(config, stream=checked(component, "stream", "stream"))
    state = Checkpoints(folder, every_seconds=0).load()
    if state is None:
        raise ConfigError(f"{folder}: no checkpoint yet; `clplat resume {folder}` trains it")
    parts = assemble(config, World())
    try:
        load_weights(parts.architecture, state, config.training.precision)
    except RuntimeError as error:
        raise ConfigError(
            f"--stream: this model does not fit the stream ({str(error).splitlines()[-1].strip()})"
        ) from error
    parts.hooks.load_state_dict(state["strategies"])
    import pandas

    cells = parts.evaluator.cells([task.index for task in parts.stream.tasks])
    return pandas.DataFrame([dataclasses.asdict(c) for c in cells])[["task", "view", "metric", "value", "count"]]


def analyze_connectivity(
    run: str | Path, *, points: int = 11, gap: int = 2, rows: int = 200
) -> tuple[Path, pandas.DataFrame]:
    """The loss on lines between the weights that a run had after its tasks (`connectivity.analysis`).

    Returns the folder of what was written, the run's `artifacts`, which MLflow gets too where it has the run, and the
    barriers: one row for each line and set of test rows.
    """
    import pandas

    from clplat.connectivity import analysis
    from clplat.lease import held
    from clplat.study_record import sync
    from clplat.tracking import RUN_STATE

    folder = run_folder_of(run)
    with held(folder):
        walks = analysis.analyze(folder, points=points, gap=gap, rows=rows)
        _, barriers = analysis.write(walks, folder / "artifacts")
    if (folder / RUN_STATE).is_file():
        sync(folder)
    return folder / "artifacts", pandas.read_csv(barriers)


def reproduce(run: str | Path, console: Console | None = None) -> pandas.DataFrame:
    """Run again what MLflow holds of a run; one row for each score, `recorded` then and `now`.

    The run is reproduced when the two columns are equal; on one machine's CPU they are, bit for bit.
    """
    import tempfile

    import pandas

    from clplat.execution import execute
    from clplat.journal import table as journal_table
    from clplat.study_record import fetch_run

    record, console = fetch_run(str(run)), console or terminal()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "again"
        folder.mkdir()
        data = plain(record.config)
        set_key(data, "tracking.enabled", False)
        save(parse(RunConfig, data), folder / "config.yaml")
        console.print(f"running {record.config.variant}, seed {record.config.seed} again …")
        outcome = execute(folder)
        if outcome.status != "FINISHED":
            raise ConfigError(f"the repetition did not finish: {outcome.reason}")
        again = journal_table(folder)
    pairs = zip(record.table.to_rows(), again.to_rows(), strict=True)
    names = ("row", "task", "view", "metric")
    return pandas.DataFrame(
        [{name: old[name] for name in names} | {"recorded": old["value"], "now": new["value"]} for old, new in pairs]
    )
