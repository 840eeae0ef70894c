"""Few-shot streams: who is trained with how many rows, who never is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from written_images import cifar10_parquet, encoded, images

from clplat.streams.episodes import EpisodeShape
from clplat.streams.few_shot import FewShotStream

SMALL: dict[str, Any] = {"base_classes": 3, "base_epochs": 2, "num_tasks": 2, "ways": 2, "shots": 4, "novel_classes": 3}


def prepared(**options: Any) -> FewShotStream:
    stream = FewShotStream(**(SMALL | options))
    stream.prepare()
    return stream


def pictures(data: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.inputs}


@pytest.fixture
def omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve characters of two alphabets, eight images each, numbered with a gap; the file as the published one is."""
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    labels = np.repeat([*range(6), *range(10, 16)], 8)
    pixels = [{"bytes": encoded(image), "path": None} for image in images(len(labels), 30, 30, seed=1)]
    alphabets = ["Greek" if label < 6 else "Korean" for label in labels]
    folder = tmp_path / "omniglot"
    folder.mkdir()
    table = {"image": pixels, "label": pa.array(labels, pa.int64()), "alphabet": alphabets}
    pq.write_table(pa.table(table), folder / "omniglot.parquet")
    return folder


def test_base_classes_come_with_all_their_rows_and_the_others_with_their_shots() -> None:
    stream = prepared()
    base, *few = stream.tasks
    assert (base.name, base.classes, len(base.train)) == ("base", (0, 1, 2), len(base.train)) and len(base.train) > 390
    assert [(task.name, task.classes) for task in few] == [("shots-1", (3, 4)), ("shots-2", (5, 6))]
    for task in few:
        assert task.train.targets.bincount().tolist()[-2:] == [4, 4] and len(task.test.data) > 80
    assert base.budget is not None and base.budget.epochs == 2 and few[0].budget is None
    assert stream.spec.num_outputs == 7


def test_without_base_classes_all_tasks_are_few_shot() -> None:
    stream = prepared(base_classes=0, base_epochs=None)
    assert [len(task.train) for task in stream.tasks] == [8, 8]


def test_novel_classes_are_in_no_training_and_no_test_set() -> None:
    stream = prepared()
    seen = set().union(*(pictures(data) for task in stream.tasks for data in (task.train, task.test.data)))
    assert [probe.name for probe in stream.probes] == ["novel-3way-1shot", "novel-3way-5shot"]
    for probe in stream.probes:
        assert probe.data.targets.unique().tolist() == [0, 1, 2] and len(probe.data) > 500
        assert not pictures(probe.data) & seen


def test_no_row_is_trained_on_and_tested() -> None:
    stream = prepared()
    trained = set().union(*(pictures(task.train) for task in stream.tasks))
    assert not trained & set().union(*(pictures(task.test.data) for task in stream.tasks))


def test_the_seed_deals_the_classes_and_draws_the_shots() -> None:
    dealt = {seed: prepared(seed=seed) for seed in (0, 1)}
    assert dealt[0].novel != dealt[1].novel
    assert prepared(seed=1).tasks[1].train.digest == dealt[1].tasks[1].train.digest
    fixed = [prepared(seed=seed, class_order="fixed") for seed in (0, 1)]
    assert [group for _, group in fixed[0].novel] == [group for _, group in fixed[1].novel] == ["7", "8", "9"]
    assert fixed[0].tasks[1].train.digest != fixed[1].tasks[1].train.digest, "the shots must be a draw of the seed"


def test_novel_groups_are_kept_apart_from_what_is_trained() -> None:
    for seed in range(4):
        assert {label for label, _ in prepared(novel_groups=["0", "1", "2"], seed=seed).novel} == {0, 1, 2}


def test_omniglot_is_read_by_alphabet_with_ink_on_nothing(omniglot: Path) -> None:
    options = {"base_classes": 2, "num_tasks": 2, "ways": 2, "shots": 2, "test_fraction": 0.5}
    shapes = [EpisodeShape(ways=3, shots=1, queries=7)]
    stream = prepared(
        source="omniglot", root=str(omniglot), novel_groups=["Korean"], episodes=shapes, side=14, **options
    )
    assert {group for _, group in stream.novel} == {"Korean"} and stream.facts()["source"] == "omniglot"
    assert stream.spec.input_shape == (1, 14, 14)
    assert [len(task.train) for task in stream.tasks] == [8, 4, 4]
    assert [len(task.test.data) for task in stream.tasks] == [8, 8, 8]
    pixels = stream.tasks[0].train.batch(torch.arange(8)).inputs
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert prepared(source="omniglot", root=str(omniglot), groups=["Greek", "Korean"], episodes=shapes, **options)


def test_cifar10_keeps_its_own_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    cifar10_parquet(tmp_path / "cifar10")
    shapes = [EpisodeShape(ways=3, shots=1, queries=5)]
    stream = prepared(source="cifar10", root=str(tmp_path / "cifar10"), episodes=shapes)
    assert [len(task.train) for task in stream.tasks] == [24, 8, 8]
    assert [len(task.test.data) for task in stream.tasks] == [12, 8, 8]
    assert len(stream.probes[0].data) == 36


WRONG = {
    "ways": ({"ways": 0}, "ways: must be at least 1, got 0"),
    "base epochs": ({"base_classes": 0}, "base_classes, base_epochs: .* got 0 and 2"),
    "novel": ({"novel_classes": 1}, "ways, shots, queries"),
    "episode ways": ({"episodes": [EpisodeShape(ways=4)]}, "episodes: .* of no more ways than the 3 novel_classes"),
    "no episodes": ({"episodes": []}, "episodes: give at least one shape"),
    "source": ({"source": "mnist"}, "source: omniglot, digits, cifar10; not 'mnist'"),
    "share": ({"test_fraction": 1.0}, "test_fraction: must be a share"),
    "classes": ({"num_tasks": 3}, "9 classes are to be trained and 3 kept apart, but there are 10 in all; lower one"),
    "groups": ({"groups": ["Greek"]}, "groups: digits has 0, 1, .*; got"),
    "shots": ({"shots": 500}, "shots: a class has only 1.. training rows, got 500"),
    "rows": ({"episodes": [EpisodeShape(ways=3, queries=400)]}, "episodes: a novel class has 1.. rows"),
    "size": ({"side": 14}, "side: digits comes in one size"),
    "no files": ({"source": "omniglot"}, "root: there is no parquet file in data"),
    "own test": ({"source": "cifar10", "test_fraction": 0.5}, "test_fraction: cifar10 has a test part"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(**options)


def test_an_unset_variable_in_the_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ValueError, match="root: .* needs the environment variable NOWHERE"):
        prepared(source="omniglot", root="${NOWHERE}/omniglot")
