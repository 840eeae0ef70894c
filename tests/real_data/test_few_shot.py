"""FewShotStream on the Omniglot file of docs/data.md: its characters and alphabets, and tasks that share none."""

from __future__ import annotations

from pathlib import Path

import pytest

from clplat.streams.few_shot import FewShotStream
from clplat.streams.few_shot_sources import omniglot

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_file_has_242_characters_of_8_alphabets_by_20_drawers_in_ink_on_nothing(data: Path) -> None:
    pool = omniglot(data / "omniglot", 0.4, 14)
    assert len(pool.groups) == 242 and len(set(pool.groups)) == 8 and pool.groups.count("Greek") == 24
    assert pool.train[1].bincount().tolist() == [12] * 242 and pool.test[1].bincount().tolist() == [8] * 242
    assert 0.05 < float(pool.train[0].float().mean()) / 255 < 0.15, "strokes cover about a tenth of an image"


def test_tasks_and_novel_classes_share_no_image(data: Path) -> None:
    stream = FewShotStream(
        source="omniglot", root=str(data / "omniglot"), base_classes=60, num_tasks=10, ways=5, novel_classes=60,
        groups=["Balinese", "Greek", "Japanese_(katakana)", "Korean", "Sanskrit"], test_fraction=0.4,
    )  # fmt: skip
    stream.prepare()
    sets = [d for task in stream.tasks for d in (task.train, task.test.data)] + [stream.probes[0].data]
    images = [image.numpy().tobytes() for one in sets for image in one.inputs]
    assert [len(task.train) for task in stream.tasks] == [720] + [25] * 10 and len(stream.probes[0].data) == 1200
    assert len(set(images)) == len(images)
