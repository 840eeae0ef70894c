"""Avalanche's SplitMNIST as a stream, against MNIST as torchvision reads it."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
import torch

from clplat.streams.avalanche_stream import AvalancheStream
from clplat.study_file import expand, load_study


def test_tasks_of_split_mnist_are_mnists_images_class_by_class_and_nothing_is_downloaded(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import MNIST

    def refuse(*arguments, **options):
        raise AssertionError("asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    stream = AvalancheStream(
        benchmark="SplitMNIST",
        arguments={"n_experiences": 5, "dataset_root": "${CLPLAT_DATA}/mnist", "fixed_class_order": list(range(10))},
    )
    stream.prepare()
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream.spec.scenario == "class" and stream.spec.num_outputs == 10
    assert stream.spec.input_shape == (1, 28, 28)
    for train in (True, False):
        whole = MNIST(data / "mnist", train=train)
        counted = 0
        for task in stream.tasks:
            rows = task.train if train else task.test.data
            counted += len(rows)
            for label in task.classes:
                # Avalanche's own normalisation: mean 0.1307, deviation 0.3081.
                expected = (whole.data[whole.targets == label].float().unsqueeze(1) / 255 - 0.1307) / 0.3081
                assert torch.allclose(rows.inputs[rows.targets == label], expected, atol=1e-6)
        assert counted == len(whole)


def test_the_shipped_study_is_checked_and_every_variant_sees_the_same_tasks(data: Path) -> None:
    runs = expand(load_study("benchmarks/avalanche_split_mnist"))
    assert {run.variant for run in runs} >= {"naive", "agem", "avalanche_agem", "avalanche_gem", "avalanche_si"}
    assert len({str(run.stream) for run in runs}) == 1
    # The variable stays in the record, so that a run can be resumed where the data lie elsewhere.
    assert runs[0].stream.init_args["arguments"]["dataset_root"] == "${CLPLAT_DATA}/mnist"
