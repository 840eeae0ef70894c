"""Few-shot studies in whole runs: probes in the record, evaluation without a trace, interruptions, shipped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import assert_resumes_as_if_never_stopped
from studies import assert_same, everything, run_folder, study

from clplat.assembly import assemble
from clplat.config import RunConfig
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.journal import last_status, read, table
from clplat.learner import Learner
from clplat.points import Translator
from clplat.result_table import Cell
from clplat.strategies.world import World
from clplat.study import preflight
from clplat.study_file import expand, load_study

STREAM = {
    "class_path": "FewShotStream",
    "init_args": {"base_classes": 3, "num_tasks": 2, "ways": 2, "shots": 5, "novel_classes": 3, "num_episodes": 40},
}
FAST_SLOW = {"class_path": "FastSlow", "init_args": {"episodes": 5, "slow_rate": 0.1}}


def few_shot(**changes: Any) -> dict[str, Any]:
    return study(stream=STREAM, **({"strategies": {"fast_slow": FAST_SLOW}} | changes))


def config(**changes: Any) -> RunConfig:
    return expand(load_study(few_shot(**changes)))[0]


def probes(folder: Path, row: int, view: str) -> dict[tuple[str, str], Cell]:
    return {(c.task, c.metric): c for c in table(folder).cells(row) if c.index is None and c.view == view}


def test_novel_classes_are_scored_at_every_boundary_through_both_views_with_their_interval(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, few_shot())
    execute(folder)
    assert last_status(folder) == "FINISHED"
    for row in range(4):
        for view in ("default", "slow"):
            found = probes(folder, row, view)
            assert found.keys() == {
                (f"novel-3way-{k}shot", metric) for k in (1, 5) for metric in ("accuracy", "half_width")
            }
            accuracy, half = (found["novel-3way-1shot", metric] for metric in ("accuracy", "half_width"))
            assert (accuracy.count, half.count) == (40, 1) and not accuracy.headline
            assert 0.3 < accuracy.value <= 1 and 0 < half.value < 0.1
    translator = Translator()
    keys = {key for entry in read(folder) for key, *_ in translator.points(entry)}
    assert {f"eval/slow/probe/novel-3way-5shot/{metric}" for metric in ("accuracy", "half_width")} <= keys
    fast, slow = (probes(folder, 2, view)["novel-3way-5shot", "accuracy"].total for view in ("default", "slow"))
    assert fast != slow


def test_probes_at_the_ends_alone_have_the_scores_that_they_have_where_they_are_scored_always(tmp_path: Path) -> None:
    always, ends = (
        run_folder(tmp_path, few_shot(evaluation={"every": 7, "probes": when}), when) for when in ("always", "ends")
    )
    for folder in (always, ends):
        execute(folder)
    tables = table(always), table(ends)
    np.testing.assert_array_equal(tables[0].scores(), tables[1].scores())
    for row, scored in enumerate([True, False, False, True]):
        wanted = [cell for cell in tables[0].cells(row) if scored or cell.index is not None]
        assert repr(tables[1].cells(row)) == repr(wanted) and len(wanted) > 4
    inside = [entry["cells"] for entry in read(ends) if entry["kind"] == "curve"]
    assert inside and all(cell["index"] is not None for cells in inside for cell in cells)


def test_no_training_batch_holds_a_row_of_a_novel_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = assemble(config(), World())
    novel = {image.numpy().tobytes() for image in parts.stream.probes[0].data.inputs}
    seen: set[bytes] = set()
    original = Learner._loss

    def loss(self: Learner, output: Any, batch: Any, parts: Any) -> Any:
        seen.update(image.numpy().tobytes() for image in batch.inputs)
        return original(self, output, batch, parts)

    monkeypatch.setattr(Learner, "_loss", loss)
    execute(run_folder(tmp_path, few_shot()))
    assert len(seen) > 100 and not seen & novel


def test_scores_are_the_same_in_any_order_and_again_and_with_bounded_rows() -> None:
    parts = assemble(config(), World())
    evaluator = parts.evaluator
    first = {(c.view, c.task, c.metric): c.value for c in evaluator.cells([0]) if c.index is None}
    evaluator.probes, evaluator.tasks = list(evaluator.probes)[::-1], evaluator.tasks[::-1]
    evaluator.max_rows = 50  # too few for an episode of 20 rows a class: probes need all of theirs
    assert {(c.view, c.task, c.metric): c.value for c in evaluator.cells([0]) if c.index is None} == first


def test_every_process_scores_all_episodes_and_counts_them_once() -> None:
    alone = assemble(config(), World()).evaluator
    shared = assemble(config(), World()).evaluator

    class Two(World):
        """The second of two processes, whose sums are never added up with others here."""

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return 2 * tensor

    shared.world = Two(rank=1, size=2)
    cells = [{(c.view, c.task, c.metric): (c.total, c.count) for c in e.cells([0]) if c.index is None}
             for e in (alone, shared)]  # fmt: skip
    assert cells[0] == cells[1]


def test_weights_are_the_same_bit_for_bit_however_often_novel_classes_are_scored(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / name, few_shot(evaluation__every=every)) for name, every in (("a", None), ("b", 5))
    ]
    for folder in folders:
        execute(folder)
    left, right = (everything(folder) for folder in folders)
    for key in ("architecture", "strategies", "table"):
        assert_same(left[key], right[key], key)


@pytest.mark.parametrize("stop", [5, 17, 30])
def test_a_run_stopped_in_any_task_and_resumed_equals_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    assert_resumes_as_if_never_stopped(few_shot(), step=stop, folder=tmp_path)


def test_a_model_that_shows_no_features_is_refused_with_what_to_do() -> None:
    evaluator = assemble(config(strategies={}), World()).evaluator
    original = type(evaluator.architecture).forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        output = original(self, *arguments, **options)
        output.hidden = None
        return output

    evaluator.architecture.forward = forward.__get__(evaluator.architecture)
    with pytest.raises(ConfigError, match="architecture: MLP shows no features, which this stream's scores need; let"):
        evaluator.cells([])


@pytest.mark.parametrize("name", ["few_shot_digits", "few_shot_omniglot"])
def test_the_shipped_studies_are_sound(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = expand(load_study(f"benchmarks/{name}"))
    assert len({config.variant for config in configs}) * 5 == len(configs)
    if name == "few_shot_digits":
        preflight([config for config in configs if config.seed == 0])
