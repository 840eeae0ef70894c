"""Split-Digits and the splitter behind it: scenarios, orders, samples, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clplat.streams.split import class_groups, split_tasks
from clplat.streams.vision import SplitDigits


def digits(**options: Any) -> SplitDigits:
    stream = SplitDigits(**options)
    stream.prepare()
    return stream


def samples(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that say their label: sample n has the class n modulo 6 and the value n."""
    return torch.arange(count).float()[:, None], torch.arange(count) % 6


def split(groups: list[tuple[int, ...]], scenario: Any, test: Any = None) -> Any:
    return split_tasks(train=samples(), val=samples(6), test=test or samples(), groups=groups, scenario=scenario)


def test_each_task_has_exactly_the_samples_of_its_classes() -> None:
    _, tasks = split([(0, 3), (5, 1)], "class")
    assert [sorted(task.train.inputs.flatten().tolist()) for task in tasks] == [[0, 3, 6, 9], [1, 5, 7, 11]]


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_classes_get_output_units_in_their_order_of_appearance(scenario: str) -> None:
    spec, tasks = split([(0, 3), (5, 1)], scenario)
    assert spec.num_outputs == 4 and spec.scenario == scenario
    assert [task.classes for task in tasks] == [(0, 1), (2, 3)]
    unit = dict(zip(tasks[1].train.inputs.flatten().tolist(), tasks[1].train.targets.tolist(), strict=True))
    assert unit == {5: 2, 11: 2, 1: 3, 7: 3}


def test_in_the_domain_scenario_all_tasks_share_the_places_within_the_group() -> None:
    spec, tasks = split([(0, 3), (5, 1)], "domain")
    assert spec.num_outputs == 2
    assert [task.classes for task in tasks] == [(0, 1), (0, 1)]
    assert {(int(x) % 6, int(y)) for x, y in zip(tasks[1].train.inputs, tasks[1].train.targets, strict=True)} == {
        (5, 0), (1, 1),
    }  # fmt: skip


def test_rows_and_scores_know_their_task_and_what_to_score() -> None:
    spec, tasks = split([(0, 3), (5, 1)], "class")
    assert spec.kind == "classify" and spec.input_shape == (1,)
    for index, task in enumerate(tasks):
        assert task.index == index and task.headline == "accuracy" and task.headline in task.test.scorer.metrics
        assert task.train.batch(torch.arange(4)).task.tolist() == [index] * 4


def test_a_task_without_samples_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"task 'classes-5-1': there are no test samples of the classes \[5, 1\]"):
        split([(0, 3), (5, 1)], "class", test=samples(1))


def test_orders_are_fixed_listed_or_drawn_by_the_seed() -> None:
    assert class_groups("fixed", num_classes=6, num_tasks=3) == [(0, 1), (2, 3), (4, 5)]
    assert class_groups([5, 0, 3, 1], num_classes=6, num_tasks=2) == [(5, 0), (3, 1)]
    drawn = [class_groups("seeded", num_classes=6, num_tasks=3, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(sum(drawn[0], ())) == list(range(6))


def test_a_task_order_permutes_whole_tasks() -> None:
    assert class_groups("fixed", num_classes=6, num_tasks=3, order=[2, 0, 1]) == [(4, 5), (0, 1), (2, 3)]
    turned = digits(order=[4, 3, 2, 1, 0])
    assert turned.order() == "classes-8-9>classes-6-7>classes-4-5>classes-2-3>classes-0-1"
    assert turned.tasks[4].train.inputs.equal(digits().tasks[0].train.inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 3}, "num_tasks: 10 classes cannot be split into 3 equal tasks"),
        ({"num_tasks": 0}, "num_tasks: .*into 0"),
        ({"class_order": []}, "num_tasks: 0 classes"),
        ({"class_order": [1, 1]}, "class_order: .*at most once"),
        ({"class_order": [3, 10], "num_tasks": 1}, "class_order: name classes 0 to 9"),
        ({"order": [0, 1, 2, 3, 3]}, "order: name the tasks 0 to 4, each once"),
        ({"test_fraction": 0.8, "val_fraction": 0.2}, "test_fraction, val_fraction"),
    ],
)
def test_wrong_options_are_refused_by_the_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitDigits(**options)


def test_digits_are_images_between_0_and_1_and_none_is_in_two_sets() -> None:
    stream = digits()
    sets = [data for task in stream.tasks for data in (task.train, task.val.data, task.test.data)]
    assert sum(map(len, sets)) == 1797
    images = torch.cat([data.inputs for data in sets])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1
    assert len(images.unique(dim=0)) == 1797


def test_every_class_has_its_share_in_every_set() -> None:
    for task in digits(test_fraction=0.2, val_fraction=0.1).tasks:
        for unit in task.classes:
            counts = [int((data.targets == unit).sum()) for data in (task.test.data, task.val.data, task.train)]
            assert [round(count / sum(counts), 1) for count in counts] == [0.2, 0.1, 0.7]


def test_the_seed_changes_which_classes_meet_and_never_which_samples_are_tested() -> None:
    first, second = (digits(class_order="seeded", seed=seed) for seed in (0, 1))
    assert first.order() != second.order()
    tested = [torch.cat([task.test.data.inputs for task in stream.tasks]).unique(dim=0) for stream in (first, second)]
    assert torch.equal(*tested)


def test_without_validation_samples_there_is_no_validation_set() -> None:
    assert all(task.val is None for task in digits(val_fraction=0).tasks)
