"""What a search space says, and what is refused before the first trial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import CAPACITY, LR, RATIO, SPACE, tune_study

from clplat.config import parse_yaml
from clplat.errors import ConfigError
from clplat.study_file import load_study
from clplat.tuning.checks import load_tune
from clplat.tuning.protocol import Protocol, prepare
from clplat.tuning.space import dimensions_of

OPTIMIZER = "training.optimizer"


def prepared(**changes: Any) -> Protocol:
    return prepare(load_tune(tune_study(**changes)))


def refused(words: str, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        prepared(**changes)
    assert not Path("runs").exists()


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    key = "strategies.replay.init_args.capasity"
    refused(f"space.{key}: there is no such key; did you mean '{CAPACITY}'", space={key: {"low": 1, "high": 2}})
    refused("space.trainig.optimizer.init_args.lr: .* did you mean 'training", space={"trainig." + LR[9:]: SPACE[LR]})
    refused(
        "space.seeds: are those of the report; trials have tune.seeds; leave", space={"seeds": {"choices": [[0], [1]]}}
    )


@pytest.mark.parametrize("key", ["stream.init_args.num_tasks", "tasks", "evaluation.every", "training.threads"])
def test_what_scores_are_measured_on_cannot_be_searched(key: str) -> None:
    refused(f"space.{key}: .*; leave it out of the space", space={key: {"low": 1, "high": 2}})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"low": 1e-3}, "high is missing"),
        ({"low": 1.0, "high": 0.1}, "low must be less than high"),
        ({"low": 0.0, "high": 0.1, "log": True}, "low: must be above 0, since log is set; got 0.0"),
        ({"low": 1e-3, "high": 1.0, "step": 0.1, "log": True}, "step: does not go with log"),
        ({"low": 1e-3, "hihg": 1.0}, "did you mean 'high'"),
        ({"low": "a", "high": 1.0}, "low: must be a number, got 'a'"),
        ({"choices": []}, "choices is empty; name two values or more"),
        ({"choices": [0.1, 0.1]}, "stands twice"),
        (0.1, "expected {low, high} or {choices}, got 0.1"),
    ],
)
def test_a_range_that_means_nothing_is_refused_by_its_key(fields: Any, words: str) -> None:
    refused(f"space.{LR}.*{words}", space={LR: fields})


def test_the_search_must_hold_the_configurations_own_values() -> None:
    refused(
        f"space.{LR}: the configuration's own value 0.1 lies outside 0.2 to 1;", space={LR: {"low": 0.2, "high": 1.0}}
    )
    refused("own value 40 lies outside 10 to 90 in steps of 20", space={CAPACITY: {"low": 10, "high": 90, "step": 20}})
    refused("own value 'reservoir' is not among the choices",
            space={"strategies.replay.init_args.policy": {"choices": ["ring_reservoir"]}})  # fmt: skip
    refused("own value None is no number", space={"training.clip_norm": {"low": 0.1, "high": 1.0}})


def test_what_a_component_refuses_at_a_corner_is_said_before_the_first_trial_and_names_the_corner() -> None:
    refused(f"space.{RATIO} = -1: strategies.replay: .*ratio", space={RATIO: {"low": -1, "high": 2}})
    refused(f"space.{CAPACITY} = 0.5: strategies.replay.init_args.capacity: expected a whole number",
            space={CAPACITY: {"low": 0.5, "high": 90}})  # fmt: skip
    refused("space.strategies.replay.init_args.policy = lottery", 
            space={"strategies.replay.init_args.policy": {"choices": ["reservoir", "lottery"]}})  # fmt: skip
    refused("space.training.batch_size = 0: training.batch_size: must be at least 1",
            space={"training.batch_size": {"low": 0, "high": 32}})  # fmt: skip
    refused("space: is empty", space={})


def test_nested_and_dotted_keys_say_the_same_and_are_joined() -> None:
    nested = {"training": {"optimizer": {"init_args": {"lr": {"low": 1e-3, "high": 1.0, "log": True}}}}}
    dotted = prepared(space={LR: SPACE[LR]}).space.dimensions
    assert prepared(space=nested).space.dimensions == dotted
    joined = load_tune(tune_study(space={LR: SPACE[LR]}), [(f"space.{LR}.high", "0.5")])
    assert prepare(joined).space.dimensions[LR].high == 0.5
    stepped = tune_study(space={RATIO: {"low": 0.25, "high": 2.0, "step": 0.25}})
    chosen = load_tune(stepped, [(f"space.{RATIO}", "{choices: [0.25, 1.0]}")])
    assert chosen.space == {RATIO: {"choices": [0.25, 1.0]}}
    whole = load_tune(stepped, [(f"space.{RATIO}", "{low: 0.25, high: 1.0}"), (f"space.{LR}.low", "0.1"),
                                (f"space.{LR}.high", "0.2")])  # fmt: skip
    assert whole.space[RATIO] == {"low": 0.25, "high": 1.0}
    assert dimensions_of(whole.space, lambda _: 0.1)[LR].high == 0.2


def test_a_range_is_of_whole_numbers_where_its_ends_and_the_own_value_are() -> None:
    space = prepared(space={CAPACITY: SPACE[CAPACITY], RATIO: {"low": 0, "high": 2}, LR: SPACE[LR]}).space
    assert [space.dimensions[key].whole for key in (CAPACITY, RATIO, LR)] == [True, False, False]


def test_a_grid_has_the_points_of_its_steps_and_choices() -> None:
    policy = {"choices": ["reservoir", "ring_reservoir"]}
    space = {CAPACITY: {"low": 20, "high": 45, "step": 10}, "strategies.replay.init_args.policy": policy}
    points = prepared(space=space, tune__sampler="grid").space.grid()
    assert [tuple(point.values()) for point in points] == [
        (capacity, name) for capacity in (20, 30, 40) for name in ("reservoir", "ring_reservoir")
    ]
    refused(f"space.{LR}: a grid needs points", tune__sampler="grid", space={LR: SPACE[LR]})


def test_whole_components_can_be_chosen_and_the_own_one_is_known_however_it_is_written() -> None:
    own, other = (
        {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        {"class_path": "AdamW", "init_args": {"lr": 0.01}},
    )
    protocol = prepared(space={OPTIMIZER: {"choices": [other, own]}})
    default = protocol.space.default(protocol.resolve)
    assert protocol.space.values(default) == {OPTIMIZER: own}
    run = protocol.resolve({OPTIMIZER: other})
    assert run.training.optimizer.class_path.endswith("AdamW") and "momentum" not in run.training.optimizer.init_args


def test_a_place_in_a_list_changes_the_list_and_nothing_else() -> None:
    key = "architecture.init_args.hidden_sizes.0"
    protocol = prepared(space={key: {"low": 8, "high": 64, "log": True}})
    assert protocol.space.changes({key: 16}) == {"architecture": {"init_args": {"hidden_sizes": [16]}}}
    assert protocol.resolve({key: 16}).architecture.init_args["hidden_sizes"] == [16]


def test_a_unit_of_the_budget_takes_the_place_of_the_other() -> None:
    protocol = prepared(space={"training.budget.steps": {"low": 4, "high": 20}})
    assert protocol.resolve({"training.budget.steps": 7}).training.budget.steps == 7


def test_seeds_of_the_search_and_of_the_report_may_not_meet() -> None:
    refused(r"tune.seeds: \[1\] are seeds of the report too, which must be fresh", tune__seeds=[1, 5])
    refused("tune.seeds: give at least one, each once", tune__seeds=[5, 5])


def test_a_search_sees_the_first_half_of_the_tasks_and_all_of_them_only_on_demand() -> None:
    protocol = prepared(stream__init_args__num_tasks=6)
    assert (protocol.trials.tasks, protocol.report.tasks, protocol.seen) == (3, None, 3)
    assert protocol.tuned_on == "the first 3 of 6 tasks" and len(protocol.streams[0]["order"]) == 3
    refused("tune.tasks: 9 is more than the 3 tasks of the stream, and nothing is left", tune__tasks=9)
    assert prepared().trials.tasks == 2 and prepared(tune__tasks=1).trials.tasks == 1
    refused("tune.tasks: the first 3 are all 3 tasks .* say --on-test-sequence", tune__tasks=3)
    refused("tune.tasks: the first 2 are all 2 tasks", stream__init_args__num_tasks=2)
    seen = prepared(tune__on_test_sequence=True)
    assert seen.trials.tasks is None and seen.tags() == {
        "tuned_on": "the test sequence itself", "on_test_sequence": "true"
    }  # fmt: skip
    refused("leave tasks and development out", tune__on_test_sequence=True, tune__tasks=2)


def test_a_development_stream_takes_the_place_of_the_first_tasks_but_may_not_be_the_reported_one() -> None:
    other = {"class_path": "SplitDigits", "init_args": {"num_tasks": 2, "class_order": [6, 7, 8, 9]}}
    protocol = prepared(tune__development=other)
    assert protocol.tuned_on == "the development stream SplitDigits" and protocol.seen == 0
    assert protocol.streams[0]["order"] == ["classes-6-7", "classes-8-9"]
    assert protocol.report.stream.init_args["class_order"] == [0, 1, 2, 3, 4, 5]
    refused("tune.development: is the stream that is reported", tune__development=tune_study()["stream"])
    refused("tune.development.init_args.num_taks: .* did you mean 'num_tasks'",
            tune__development={"class_path": "SplitDigits", "init_args": {"num_taks": 2}})  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("objectives", ["final_scor"], "did you mean 'final_score'"),
        ("objectives", [], "give at least one"),
        ("trials", 0, "must be at least 1"),
        ("timeout", 0.0, "must be positive"),
        ("storage", "optuna.db", "expected a URL"),
        ("sampler", "tpee", "did you mean 'tpe'"),
        ("variant", "er", "no variant is called 'er'"),
        ("tirals", 3, "did you mean 'trials'"),
    ],
)
def test_an_option_of_the_search_that_means_nothing_is_refused_by_its_key(key: str, value: Any, words: str) -> None:
    refused(f"tune.{key}: .*{words}", **{f"tune__{key}": value})


def test_an_objective_that_one_task_cannot_have_is_refused_before_the_first_trial() -> None:
    both = ["final_score", "final_forgetting"]
    refused("tune.objectives: final_forgetting needs two tasks; tune.tasks is 1", tune={"objectives": both, "tasks": 1})
    one = {"class_path": "SplitDigits", "init_args": {"num_tasks": 1, "class_order": [6, 7]}}
    refused("tune.objectives: backward_transfer needs two tasks; the development stream SplitDigits has one",
            tune={"objectives": ["backward_transfer"], "development": one})  # fmt: skip
    assert prepared(tune={"objectives": ["learning_score", "cost/training_flops"], "tasks": 1}).trials.tasks == 1
    refused("tune.objectives: forward_transfer .*scenario: class",
            tune={"objectives": ["forward_transfer"]}, stream__init_args__scenario="class")  # fmt: skip


@pytest.mark.parametrize("name", ["tune.yaml", "study.yaml"])
def test_a_folder_in_place_of_a_configuration_is_named_as_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    kind = name.partition(".")[0]
    with pytest.raises(
        ConfigError, match=f"is a {kind}'s folder; `clplat resume {tmp_path}`.*its {name} is the config"
    ):
        load_tune(tmp_path)


def test_wrong_words_are_refused_before_anything_that_trains_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(tune_study(space={LR: {"low": 1.0, "high": 0.5}})))
    code = (
        "import sys; from clplat.cli import main\ntry: main(['tune', 'search.yaml'])\n"
        "finally: print({'torch', 'optuna', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "low must be less than high" in done.stderr and done.returncode == 1 and done.stdout == "set()\n"


def test_of_several_variants_one_is_named_and_tuned() -> None:
    variants = {"small": {"training": {"batch_size": 8}}, "large": {"training": {"batch_size": 24}}}
    refused("tune.variant: say which variant is tuned: small, large", variants=variants)
    protocol = prepared(variants=variants, tune__variant="large")
    assert protocol.resolve({}).training.batch_size == protocol.report.training.batch_size == 24
    assert not protocol.report.variants


def test_the_command_refuses_in_one_line_and_passes_its_flag_on(capsys, monkeypatch) -> None:
    from clplat.cli import main
    from clplat.tuning import tune

    with pytest.raises(SystemExit, match="1"):
        main(["tune", "tune/split_digits", "--space.training.optimizer.init_args.momentun", "{low: 0.1, high: 0.9}"])
    assert "momentun: there is no such key; did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["tune", "quickstart", "--variants", "er"])
    assert "space: is empty" in capsys.readouterr().err and not Path("runs").exists()
    asked: list[Any] = []
    monkeypatch.setattr(tune, "run_tune", lambda study, console: asked.append(study) or tune.Tuned(
        folder=Path(), status="KILLED", code=75))  # fmt: skip
    with pytest.raises(SystemExit, match="75"):
        main(["tune", "tune/split_digits", "--on-test-sequence", "--tune.trials", "3"])
    assert asked[0].tune.on_test_sequence and asked[0].tune.trials == 3


def test_the_shipped_searches_are_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from clplat.study_file import shipped_folder

    files = sorted((shipped_folder() / "tune").glob("*.yaml"))
    assert [file.stem for file in files] == ["split_digits", "text"]
    for file in files:
        data = parse_yaml(file.read_text())
        assert not set(data["seeds"]) & set(data["tune"].get("seeds", [1000])) and data["space"]
    assert prepare(load_study("tune/split_digits")).trials.tasks == 3


def test_a_study_of_the_first_tasks_has_no_others_and_cannot_have_more_than_there_are() -> None:
    from clplat.assembly import prepared_stream
    from clplat.study_file import expand

    data = tune_study() | {"tasks": 2}
    stream, whole = (prepared_stream(expand(load_study(one))[0]) for one in (data, tune_study()))
    assert [task.name for task in stream.tasks] == ["classes-0-1", "classes-2-3"] and stream.spec == whole.spec
    with pytest.raises(ConfigError, match="tasks: the first 4 were asked for, and the stream has 3"):
        prepared_stream(expand(load_study(data | {"tasks": 4}))[0])
