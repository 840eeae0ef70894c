"""What a search may see, and what its result is reported on.

The default is honest: trials run on the first half of the tasks (or on a development stream) with seeds of their own,
and the settings that are found run on the full stream with the study's seeds, which no trial has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clplat.components import Component
from clplat.config import Experiment, RunConfig, StudyConfig, parse, plain
from clplat.errors import ConfigError, nearest
from clplat.study import preflight
from clplat.study_file import expand
from clplat.tuning.checks import check_objectives
from clplat.tuning.space import Space


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A search made ready: the study that its trials belong to, the study of the report, and what sets them apart."""

    trials: StudyConfig
    report: StudyConfig
    space: Space
    seen: int
    """Tasks of the reported stream that trials see; 0 with a development stream."""
    tuned_on: str
    streams: Sequence[Mapping[str, Any]]
    """What the trials' stream holds, for `planned.json`."""
    on_test_sequence: bool

    def tags(self) -> dict[str, str]:
        """What every run of the search and of its report is marked with."""
        return {"tuned_on": self.tuned_on, "on_test_sequence": str(self.on_test_sequence).lower()}

    def resolve(self, values: Mapping[str, Any]) -> RunConfig:
        """The first run of a trial with these values of the space."""
        return expand(self.study_of({"trial": values}))[0]

    def study_of(self, trials: Mapping[str, Mapping[str, Any]]) -> StudyConfig:
        """The trials' study with these trials, values by name, as its variants."""
        variants = {name: self.space.changes(values) for name, values in trials.items()}
        return dataclasses.replace(self.trials, variants=variants)


def prepare(study: StudyConfig) -> Protocol:
    """Check what has to be built to be known before the first trial, and build the two studies.

    Each corner of the space is built as `clplat run` would build it, so that what a component refuses is said now. What
    is cheap to check comes before what reads data.
    """
    whole = _tuned_arm(study)
    space = Space(study.space, {f.name: plain(getattr(whole, f.name)) for f in dataclasses.fields(Experiment)})
    protocol = Protocol(
        trials=whole, report=whole, space=space, seen=0, tuned_on="", streams=(),
        on_test_sequence=study.tune.on_test_sequence,
    )  # fmt: skip
    space.default(protocol.resolve)
    if study.tune.sampler == "grid":
        space.grid()
    total = len(preflight(expand(whole), here=study.launcher.kind == "local")[0]["order"])
    trials, seen, tuned_on = _tuned_stream(study, whole, total)
    protocol = dataclasses.replace(protocol, trials=trials, seen=seen, tuned_on=tuned_on)
    if "forward_transfer" in study.tune.objectives and trials.stream.init_args.get("scenario") == "class":
        raise ConfigError("tune.objectives: forward_transfer needs scores of tasks before they are trained, and with "
                          "scenario: class their classes are not answered")  # fmt: skip
    streams = _check_corners(protocol)
    check_objectives(study.tune.objectives, len(streams[0]["order"]), f"{tuned_on} has one")
    return dataclasses.replace(protocol, streams=streams)


def _tuned_arm(study: StudyConfig) -> StudyConfig:
    """The study with its tuned variant alone, as the study's own configuration, every default filled in."""
    name = study.tune.variant
    if name is not None and name not in study.variants:
        raise ConfigError(f"tune.variant: no variant is called {name!r}{nearest(name, study.variants)}")
    if name is None and len(study.variants) > 1:
        raise ConfigError(f"tune.variant: say which variant is tuned: {', '.join(study.variants)}")
    runs = {run.variant: run for run in expand(study)}
    run = runs[name] if name is not None else next(iter(runs.values()))
    shared = {f.name: plain(getattr(run, f.name)) for f in dataclasses.fields(Experiment)}
    own = {"name": study.name, "seeds": study.seeds, "folder": study.folder, "launcher": plain(study.launcher)}
    return parse(StudyConfig, shared | own)


def _tuned_stream(study: StudyConfig, whole: StudyConfig, total: int) -> tuple[StudyConfig, int, str]:
    """The study of the trials, the reported tasks it sees, and that in words; refuses to see all of them unasked."""
    tune, trials = study.tune, dataclasses.replace(whole, seeds=list(study.tune.seeds))
    if tune.on_test_sequence:
        if tune.tasks is not None or tune.development is not None:
            raise ConfigError("tune.on_test_sequence: tunes on the whole stream; leave tasks and development out")
        return trials, total, "the test sequence itself"
    if tune.development is not None:
        return _on_development(trials, tune.development, tune.tasks)
    tasks = tune.tasks if tune.tasks is not None else max(2, -(-total // 2))
    if tasks >= total:
        all_of_them = f"the first {tasks} are all {total} tasks of the stream"
        asked = all_of_them if tasks == total else f"{tasks} is more than the {total} tasks of the stream"
        raise ConfigError(
            f"tune.tasks: {asked}, and nothing is left that the search has not seen; tune on fewer tasks or on a "
            "tune.development stream, or leave tune.tasks out and say --on-test-sequence"
        )
    return dataclasses.replace(trials, tasks=tasks), tasks, f"the first {tasks} of {total} tasks"


def _on_development(trials: StudyConfig, development: Component, tasks: int | None) -> tuple[StudyConfig, int, str]:
    swapped = dataclasses.replace(trials, stream=development, tasks=tasks)
    try:
        stream = expand(swapped)[0].stream
    except ConfigError as error:
        raise ConfigError(str(error).replace("stream", "tune.development", 1)) from error
    if stream == trials.stream:
        raise ConfigError("tune.development: is the stream that is reported; give another, or say --on-test-sequence")
    return dataclasses.replace(swapped, stream=stream), 0, f"the development stream {stream.class_path.split('.')[-1]}"


def _check_corners(protocol: Protocol) -> Sequence[Mapping[str, Any]]:
    """Build the runs at the corners of the space; an error names the corner."""
    runs = [dataclasses.replace(protocol.resolve({}), variant="the configuration itself")]
    for name, values in protocol.space.corners().items():
        try:
            runs.append(dataclasses.replace(protocol.resolve(values), variant=name))
        except ConfigError as error:
            raise ConfigError(f"{name}: {str(error).removeprefix('variants.trial.')}") from error
    try:
        return preflight(runs, here=protocol.trials.launcher.kind == "local")
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("variant ")) from error
