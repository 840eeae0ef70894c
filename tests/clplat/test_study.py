"""What a study must show: naive forgets, cumulative does not, replay lies between; however it is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import study

import clplat
from clplat.errors import StudyFailedError
from clplat.journal import table
from clplat.metrics import summary

ARMS: dict[str, Any] = {
    "naive": {},
    "er": {"strategies": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 60}}}},
    "cumulative": {"strategies": {"data": {"class_path": "Cumulative"}}},
}
STREAMS: dict[str, dict[str, Any]] = {
    "digits": study(training__budget={"steps": 60}, checkpoint={"every_seconds": 60}),
    "text": study(
        name="text",
        stream={
            "class_path": "StdlibText",
            "init_args": {"block_size": 64, "max_train_tokens": 60_000, "max_eval_tokens": 4_000, "max_answers": 2},
        },
        architecture={"class_path": "Transformer", "init_args": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}},
        training={
            "budget": {"steps": 60}, "batch_size": 16, "clip_norm": 1.0,
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 5e-3}},
        },
        checkpoint={"every_seconds": 60},
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS)
def test_naive_forgets_cumulative_does_not_and_replay_lies_between_for_three_seeds(
    stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    data = STREAMS[stream] | {"variants": ARMS, "seeds": [0, 1, 2], "launcher": {"workers": 1}}
    done = clplat.run(data, quiet=True)
    assert done.code == 0, [outcome.reason for outcome in done.outcomes]
    for seed in (0, 1, 2):
        naive, er, cumulative = (
            summary(table(done.folder / f"{arm}-s{seed}"))["cumulative_forgetting"] for arm in ARMS
        )
        assert naive > er > cumulative, f"seed {seed}: {naive:.3f}, {er:.3f}, {cumulative:.3f}"
        assert naive > 0.5
        assert cumulative < 0.3 * naive


def test_runs_side_by_side_give_the_results_of_runs_one_after_another(tmp_path: Path) -> None:
    data = study(variants={"naive": {}, "er": ARMS["er"]}, seeds=[0, 1])
    one = clplat.run(data, {"launcher.workers": 1}, quiet=True)
    two = clplat.run(data, {"launcher.workers": 2}, quiet=True)
    assert one.code == two.code == 0
    for name in ("naive-s0", "naive-s1", "er-s0", "er-s1"):
        assert str(table(one.folder / name).to_rows()) == str(table(two.folder / name).to_rows())


def test_variants_of_one_seed_start_from_the_same_weights_and_see_the_same_first_task(tmp_path: Path) -> None:
    done = clplat.run(study(variants={"naive": {}, "er": ARMS["er"]}, launcher={"workers": 1}), quiet=True)
    naive, er = (table(done.folder / name) for name in ("naive-s0", "er-s0"))
    first = [[cell.value for cell in run.cells(1) if cell.index == 0] for run in (naive, er)]
    assert first[0] == first[1]


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_digits_run_in_every_scenario_and_unseen_classes_have_no_score(scenario: str, tmp_path: Path) -> None:
    done = clplat.run(study(stream__init_args={"scenario": scenario, "num_tasks": 5}), quiet=True)
    scores = table(done.folder / "digits-s0").matrix("accuracy")
    assert scores.shape == (6, 5)
    unseen = scores[1, 1:]
    assert (unseen != unseen).all() if scenario == "class" else ((unseen >= 0) & (unseen <= 1)).all()


def test_a_study_of_which_every_run_failed_is_an_error_in_python(tmp_path: Path) -> None:
    data = study(training__optimizer={"class_path": "SGD", "init_args": {"lr": 1e30}}, seeds=[0, 1])
    with pytest.raises(
        StudyFailedError, match=r"runs/digits-.*: every run failed; digits-s0: .*lower training\.optimizer"
    ):
        clplat.run(data | {"launcher": {"workers": 1}}, quiet=True)
