"""Avalanche benchmarks as streams: rows, classes and scenario are the benchmark's own, and nothing is drawn anew."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from clplat.components import Component, build, checked
from clplat.streams.avalanche_stream import AvalancheStream, quiet

SIZES = (7, 9, 5)


def rows(number: int, count: int, classes: int = 2, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(number)
    return torch.rand(count, 1, 4, 4, generator=source), first + torch.arange(count) % classes


def plain(shared: bool = True, one_test_set: bool = False, training_noise: bool = False):
    """Three experiences of two classes, made with `benchmark_from_datasets` from tensors."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset as make

    def one(number: int, count: int):
        inputs, targets = rows(number, count, first=0 if shared else 2 * (number % 10))
        noise = (lambda image: image + torch.rand_like(image)) if training_noise else None
        groups = {"train": (noise, None), "eval": (None, None)}
        return make(inputs, targets, targets=targets.tolist(), task_labels=0, transform_groups=groups)

    train, test = [one(n, size) for n, size in enumerate(SIZES)], [one(10 + n, 4) for n in range(3)]
    return benchmark_from_datasets(
        train=train, test=[test[0].concat(test[1]).concat(test[2])] if one_test_set else test
    )


def split(task_labels: bool = False, seed: int | None = None, **options):
    """Two experiences of three classes, made with `nc_benchmark` from tensors."""
    from avalanche.benchmarks import nc_benchmark
    from torch.utils.data import TensorDataset

    class Labelled(TensorDataset):
        def __init__(self, number: int, count: int) -> None:
            inputs, targets = rows(number, count, classes=6)
            super().__init__(inputs, targets)
            self.targets = targets.tolist()

        def __getitem__(self, index: int):
            return self.tensors[0][index], self.targets[index]

    return nc_benchmark(
        Labelled(0, 60), Labelled(1, 18), n_experiences=2, task_labels=task_labels, seed=seed, **options
    )


def prepared(name: str, scenario=None, **arguments) -> AvalancheStream:
    stream = AvalancheStream(benchmark=f"{__name__}.{name}", arguments=arguments, scenario=scenario)
    stream.prepare()
    return stream


def test_avalanche_is_imported_when_a_stream_is_prepared_not_before_and_may_come_before_lightning() -> None:
    code = """
import sys
from clplat.streams.avalanche_stream import named
assert "avalanche" not in sys.modules
named("SplitMNIST", "avalanche.benchmarks.classic", "benchmark")
import clplat.learner
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_known_warnings_are_kept_quiet() -> None:
    with pytest.warns(DeprecationWarning, match="news"), quiet():
        warnings.warn("JAXopt is no longer maintained", DeprecationWarning, stacklevel=1)
        warnings.warn("news", DeprecationWarning, stacklevel=1)


def test_every_row_of_every_experience_is_there_in_order() -> None:
    stream = prepared("plain", shared=False)
    assert stream.spec.num_outputs == 6 and stream.spec.input_shape == (1, 4, 4) and stream.spec.scenario == "class"
    for number, task in enumerate(stream.tasks):
        for data, (inputs, targets) in (
            (task.train, rows(number, SIZES[number], first=2 * number)),
            (task.test.data, rows(10 + number, 4, first=2 * number)),
        ):
            batch = data.batch(torch.arange(len(data)))
            assert torch.equal(batch.inputs, inputs) and torch.equal(batch.targets, targets)
            assert set(batch.task.tolist()) == {number}
        assert task.classes == (2 * number, 2 * number + 1)


def test_training_rows_come_without_augmentation() -> None:
    noisy, clean = prepared("plain", training_noise=True), prepared("plain")
    assert torch.equal(noisy.tasks[0].train.inputs, clean.tasks[0].train.inputs)


def test_the_same_classes_everywhere_are_a_domain_scenario_and_may_be_called_class() -> None:
    assert prepared("plain").spec.scenario == "domain"
    named_class = prepared("plain", scenario="class")
    assert named_class.spec.scenario == "class" and named_class.spec.num_outputs == 2


def test_task_labels_make_a_task_scenario_and_shared_class_numbers_get_heads_of_their_own() -> None:
    disjoint = prepared("split", task_labels=True)
    assert disjoint.spec.scenario == "task" and disjoint.spec.num_outputs == 6
    shared = prepared("split", task_labels=True, class_ids_from_zero_in_each_exp=True)
    assert [task.classes for task in shared.tasks] == [(0, 1, 2), (3, 4, 5)] and shared.spec.num_outputs == 6
    assert sorted(set(shared.tasks[1].train.targets.tolist())) == [3, 4, 5]


def test_class_groups_are_the_same_in_every_process_and_leave_the_global_source_alone() -> None:
    first = prepared("split")
    torch.rand(3)
    before = torch.get_rng_state()
    again = prepared("split")
    assert torch.equal(before, torch.get_rng_state())
    assert [task.classes for task in again.tasks] == [task.classes for task in first.tasks]
    assert again.tasks[0].train.digest == first.tasks[0].train.digest
    groups = set()
    for draw_seed in range(4):
        stream = AvalancheStream(benchmark=f"{__name__}.split", draw_seed=draw_seed)
        stream.prepare()
        groups.add(stream.tasks[0].classes)
    assert len(groups) > 1


def test_class_groups_are_the_benchmarks_own() -> None:
    stream = prepared("split", fixed_class_order=[5, 0, 3, 1, 2, 4])
    assert [task.classes for task in stream.tasks] == [(0, 3, 5), (1, 2, 4)]


def test_one_test_experience_serves_all_tasks_by_their_classes() -> None:
    stream = prepared("plain", shared=False, one_test_set=True)
    assert [sorted(set(task.test.data.targets.tolist())) for task in stream.tasks] == [[0, 1], [2, 3], [4, 5]]


def test_a_domain_scenario_of_disjoint_classes_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="class_ids_from_zero_in_each_exp: true"):
        prepared("split", scenario="domain")
    made = prepared("split", scenario="domain", class_ids_from_zero_in_each_exp=True)
    assert made.spec.num_outputs == 3


def test_a_benchmark_of_ones_own_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_lab_streams.py").write_text(
        "import torch\n"
        "def small(rows):\n"
        "    from avalanche.benchmarks import tensors_benchmark\n"
        "    sets = [(torch.rand(rows, 3), torch.arange(rows) % 2) for _ in range(2)]\n"
        "    return tensors_benchmark(sets, sets, task_labels=[0, 0])\n"
    )
    component = Component(
        class_path="AvalancheStream", init_args={"benchmark": "my_lab_streams.small", "arguments": {"rows": 6}}
    )
    component = checked(component, "stream", "stream")
    assert component.init_args["arguments"] == {"rows": 6}
    stream = build(component, "stream", "stream", {"seed": 3})
    stream.prepare()
    assert [len(task.train) for task in stream.tasks] == [6, 6]
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [("SplitMNISTT", {}, r"benchmark: avalanche.benchmarks.classic has no 'SplitMNISTT'"),
     ("no_such_lab.split", {}, r"benchmark: .*needs the module 'no_such_lab'"),
     ("SplitMNIST", {"experiences": 5}, r"arguments: SplitMNIST does not take \['experiences', 'seed'\]")],
)  # fmt: skip
def test_wrong_names_are_refused_by_name(benchmark: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AvalancheStream(benchmark=benchmark, arguments=arguments).prepare()


def test_variables_in_arguments_are_expanded_and_missing_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_ROOT", "/somewhere")
    options = {"dataset_root": "${MY_ROOT}/mnist", "more": [{"deep": "$MY_ROOT"}], "count": 5}
    stream = AvalancheStream(benchmark="SplitMNIST", arguments=options)
    assert stream.arguments == {"dataset_root": "/somewhere/mnist", "more": [{"deep": "/somewhere"}], "count": 5}
    with pytest.raises(ValueError, match=r"arguments.dataset_root: .* variable MY_MISSING, which is not set"):
        AvalancheStream(benchmark="SplitMNIST", arguments={"dataset_root": "${MY_MISSING}"})
