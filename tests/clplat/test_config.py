"""A wrong configuration is refused in plain words: the key, what it must be, and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import study

from clplat.errors import ConfigError
from clplat.record import budgets
from clplat.streams.budget import Budget
from clplat.study import preflight
from clplat.study_file import expand, load_study

TEXT = {"class_path": "TextStream"}
DOMAIN = {"name": "a", "path": "text", "data_files": {"train": "x.txt"}}
BPE = {"class_path": "clplat.streams.tokenizers.BPETokenizer"}
MLP = {"class_path": "MLP"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"trainin": {}}, r"trainin: there is no such key; did you mean 'training'"),
    "unknown nested key": ({"training__batchsize": 3}, r"training\.batchsize: .*did you mean 'batch_size'"),
    "wrong type": ({"training__batch_size": "many"}, r"training\.batch_size: must be a whole number, got 'many'"),
    "none of two types": ({"training__compile": "x"}, r"training\.compile: must be true or false or .*, got 'x'"),
    "neither number nor word": ({"launcher": {"workers": "x"}}, r"launcher\.workers: .*a whole number.*, got 'x'"),
    "wrong choice": ({"training__schedule": "cosin"}, r"training\.schedule: .*'cosine'.*got 'cosin'"),
    "two budgets": ({"training__budget": {"steps": 1, "epochs": 1}}, r"budget: .*exactly one"),
    "choice": ({"training__schedule": "cosin"}, r"training\.schedule: .*got 'cosin'; did you mean 'cosine'"),
    "choice of an option": ({"stream__init_args": {"scenario": "clas"}}, r"scenario: .*got clas; did you mean 'class'"),
    "target without its own": (
        {"architecture": {"class_path": "ChunkedHypernetwork", "init_args": {"target": "ChunkedHypernetwork"}}},
        r"^architecture\.init_args\.target: ChunkedHypernetwork needs the option target$",
    ),
    "unknown class": ({"stream__class_path": "SplitDigit"}, r"stream\.class_path: .*did you mean 'SplitDigits'"),
    "unknown module": ({"stream__class_path": "nowhere.Mine"}, r"stream\.class_path: there is no module 'nowhere'"),
    "wrong family": ({"stream__class_path": "clplat.architectures.mlp.MLP"}, r"MLP is not a stream"),
    "unknown option": ({"stream__init_args": {"num_task": 2}}, r"stream\.init_args\.num_task: .*'num_tasks'"),
    "option of a wrong type": ({"stream__init_args": {"num_tasks": "x"}}, r"num_tasks: expected a whole number, got x"),
    "optimizer option": ({"training__optimizer": {"class_path": "SGD", "init_args": {"momentun": 1}}}, "'momentum'"),
    "strategy class": ({"strategies": {"r": {"class_path": "ExperienceReply"}}}, r"strategies\.r.*'ExperienceReplay'"),
    "baseline": ({"baseline": "naiv", "variants": {"naive": {}}}, r"baseline: .*did you mean 'naive'"),
    "variant key": ({"variants": {"a": {"training": {"batch": 1}}}}, r"variants\.a\.training\.batch: .*'batch_size'"),
    "repeated seed": ({"seeds": [1, 1]}, r"seeds: .*each once"),
    "missing key": ({"name": None}, r"name: "),
    "a truth value for a number": (
        {"training__batch_size": True},
        r"training\.batch_size: should be a number, got true",
    ),
    "no choice of an option": (
        {"stream__init_args": {"scenario": "x"}},
        r"expected 'task' or 'domain' or 'class', got x",
    ),
    "option of a nested class": (
        {"stream": {"class_path": "TextStream", "init_args": {"domains": [{"name": "a", "train_file": "x"}]}}},
        r"stream\.init_args\.domains\.0: Domain has no option 'train_file'; did you mean 'data_files'",
    ),
    "type inside a list": (
        {"stream": TEXT | {"init_args": {"domains": [DOMAIN, DOMAIN | {"name": "b", "max_documents": "many"}]}}},
        r"stream\.init_args\.domains\.1\.max_documents: expected a whole number, got many",
    ),
    "choice inside a list": (
        {"stream": TEXT | {"init_args": {"domains": [DOMAIN | {"document": "line"}]}}},
        r"stream\.init_args\.domains\.0\.document: expected 'row' or 'heading' or 'file', got line",
    ),
    "type inside what may be missing": (
        {"stream": TEXT | {"init_args": {"domains": [DOMAIN | {"budget": {"steps": "x"}}]}}},
        r"stream\.init_args\.domains\.0\.budget\.steps: expected a whole number, got x",
    ),
    "option of an inner component": (
        {"stream": TEXT | {"init_args": {"domains": [DOMAIN], "tokenizer": BPE | {"init_args": {"vocab_size": "x"}}}}},
        r"stream\.init_args\.tokenizer\.init_args\.vocab_size: expected a whole number, got x",
    ),
    "inner component": (
        {"stream": TEXT | {"init_args": {"domains": [DOMAIN], "tokenizer": {"class_path": "nowhere.BPE"}}}},
        r"stream\.init_args\.tokenizer: class_path 'nowhere\.BPE' cannot be used",
    ),
    "option of a component that is built later": (
        {"architecture": {"class_path": "ChunkedHypernetwork", "init_args": {"target": MLP | {"init_args": {"x": 1}}}}},
        r"architecture\.init_args\.target: MLP has no option 'x'",
    ),
    "no list": (
        {"stream": TEXT | {"init_args": {"domains": 3}}},
        r"stream\.init_args\.domains: expected a list, got 3",
    ),
    "text that YAML reads as a mapping": (
        {
            "stream": {
                "class_path": "PromptAnswerStream",
                "init_args": {
                    "root": "data",
                    "tasks": [{"name": "sums"}],
                    "prompt_template": {"Q": {"question": None}},
                },
            }
        },
        r"prompt_template: expected text, got .*; YAML reads a mapping there: put the text in quotes, in a shell",
    ),
    "option's near name": (
        {"architecture__init_args": {"hidden_size": [1]}},
        r"no such option; did you mean 'hidden_sizes'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_names_the_field_and_the_nearest_valid_name(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        expand(load_study(study(**changes)))
    assert "\n" not in str(caught.value)


def test_what_an_inner_component_refuses_is_said_in_its_own_words() -> None:
    tokenizer = BPE | {"init_args": {"vocab_size": 10}}
    changed = {"stream": TEXT | {"init_args": {"domains": [DOMAIN], "tokenizer": tokenizer}}}
    with pytest.raises(ConfigError, match=r"stream\.init_args\.tokenizer: BPETokenizer\.vocab_size: at least 257"):
        preflight(expand(load_study(study(**changed))))


def test_a_component_inside_a_component_goes_by_its_bare_name_too() -> None:
    options = {"target": MLP | {"init_args": {"hidden_sizes": [7]}}}
    (run,) = expand(load_study(study(architecture={"class_path": "ChunkedHypernetwork", "init_args": options})))
    target = run.architecture.init_args["target"]
    assert target["class_path"] == "clplat.architectures.mlp.MLP"
    assert target["init_args"] == {"hidden_sizes": [7], "dropout": 0.0, "activation": "relu", "init": "torch"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "variants:\n  off: {}\n  on: {}\n",
            r"^off: YAML reads on, off, yes and no without quotes .*write 'off' .line 2",
        ),
        ("strategies:\n  yes: {class_path: Naive}\n", r"^yes: .*; write 'yes'"),
        ("variants: {a: {}}\nbaseline: off\n", r"^baseline: must be text, got False \(YAML reads on, off"),
    ],
)
def test_a_name_that_yaml_takes_for_a_boolean_is_refused_with_the_quotes_that_it_needs(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    whole = {key: value for key, value in study().items() if key != "strategies"}
    file.write_text(text + yaml.safe_dump(whole))
    with pytest.raises(ConfigError, match=message):
        load_study(file)


def test_a_variant_called_off_can_be_chosen_and_left_out() -> None:
    data = study(variants={"off": {}, "a": {}})
    assert list(load_study(data, [("variants", "off")]).variants) == ["off"]
    assert list(load_study(data, [("variants.off", "null")]).variants) == ["a"]
    assert load_study(data, [("baseline", "off")]).baseline == "off"


def test_a_baseline_that_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    data = study(variants={"a": {}, "b": {}}, baseline="a")
    assert load_study(data, [("variants", "b")]).baseline is None
    assert capsys.readouterr().err == "--variants leaves out the baseline 'a': nothing is compared with it\n"
    load_study(data, [("variants", "a")])
    assert not capsys.readouterr().err


def test_budgets_of_tasks_are_told_in_a_few_words() -> None:
    epochs = [Budget(epochs=number) for number in (5, 3, 7, 1)]
    assert budgets(epochs[:1] * 4) == "5 epochs" and budgets(epochs) == "1 to 7 epochs"
    assert budgets(epochs[3:]) == "1 epoch"
    assert budgets([epochs[0], Budget(steps=1200)]) == "5 epochs or 1,200 steps"
    ended = [Budget(steps=number, until={"accuracy": 0.9}) for number in (5, 6, 7, 8)]
    assert budgets(ended[:2]) == "5 steps, at most until accuracy 0.9 or 6 steps, at most until accuracy 0.9"
    assert budgets(ended).endswith(" or …")
