"""Runs and models under `training.compile: cudagraphs`, with a recorder that needs no GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import MODELS, rows, trained
from studies import EWC, REPLAY, assert_same, everything, run_folder, study
from tapes import Tape
from torch import nn

from clplat.architectures import mixture_of_experts
from clplat.assembly import assemble
from clplat.errors import ConfigError
from clplat.execution import execute
from clplat.strategies.world import World
from clplat.study_file import expand, load_study

TEXT = {"class_path": "StdlibText", "init_args": {"block_size": 16, "max_train_tokens": 4000}}
SMALL = {"hidden_size": 16, "dropout": 0.1, "document_mask": False}  # documents are waited for
MEMORY = {
    "class_path": "MemoryTransformer",
    "init_args": SMALL | {"layers": [{"class_path": "TitansLMM", "init_args": {"num_heads": 2, "chunk": 4}}]},
}
HOPE = {"class_path": "Hope", "init_args": SMALL | {"num_layers": 1}}
ADAM = {"class_path": "AdamW", "init_args": {"lr": 3e-3}}
SHORT = {"training__optimizer": ADAM, "training__budget": {"steps": 6}, "evaluation": {"max_rows": 4}}
STUDIES: dict[str, dict[str, Any]] = {
    "digits, dropout, replayed rows": {"strategies": {"replay": REPLAY}},
    "digits, a penalty on logits, the gradient clipped": {
        "strategies": {"dark": REPLAY | {"class_path": "DERpp"}}, "training__clip_norm": 0.5,
    },
    "digits, an objective of a strategy's own": {"strategies": {"ace": REPLAY | {"class_path": "ERACE"}}},
    "digits, a penalty on weights": {"strategies": {"ewc": EWC}},
    "digits, 16 bits": {"training__precision": "bf16-mixed"},
    "text, a memory of two layers": SHORT | {"stream": TEXT, "architecture": MEMORY},
    "text, Hope": SHORT | {"stream": TEXT, "architecture": HOPE},
}  # fmt: skip


@pytest.mark.parametrize("kind", STUDIES)
def test_a_run_of_replayed_steps_is_the_plain_run_bit_for_bit(kind: str, tmp_path: Path, tape: Tape) -> None:
    runs = []
    for mode in (False, "cudagraphs"):
        folder = run_folder(tmp_path, study(tasks=2, training__compile=mode, **STUDIES[kind]), str(mode))
        assert execute(folder).status == "FINISHED", (folder / "error.txt").read_text()
        runs.append(everything(folder))
        assert bool(tape.recordings) == bool(mode)
    # All of two tasks' steps but each one's first, forwards and backwards.
    steps = 6 if "text" in kind else 12
    assert tape.recordings == 2 * 2 and tape.replays == 2 * 2 * (steps - 1)
    assert_same(*runs)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_meant_to_be_replayed_are_and_train_the_same(
    name: str, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, which is not asked what it has counted.
    monkeypatch.setattr(mixture_of_experts, "free_to_look", lambda tensor: False)
    batches = [rows(4, "cpu", seed=step) for step in range(5)]
    batches[2:2] = [rows(4, "cpu", mixed=True, seed=step) for step in range(3)]
    courses = []
    for recorded in (False, True):
        torch.manual_seed(1)
        sgd = partial(torch.optim.SGD, lr=0.1)
        courses.append(trained(MODELS[name](), batches, recorded=recorded, optimizer=sgd))
    assert tape.recordings == 2 * 2 and tape.replays == 2 * (len(batches) - 2)
    assert courses[0].losses.isfinite().all()
    assert_same(*((course.losses, course.weights) for course in courses))


def test_a_memory_that_gives_out_is_named_from_replays_too(tape: Tape) -> None:
    blamed = []
    for recorded in (False, True):
        torch.manual_seed(1)
        model = MODELS["Titans, depth 2"]()
        breaking = partial(Breaking, weight=model.blocks[0].attention.memory.first[1], at=4)
        batches = [rows(4, "cpu", seed=step) for step in range(6)]
        trained(model, batches, recorded=recorded, optimizer=breaking)
        blamed.append(model.not_finite())
    first = "layer 0.attention, heads 0, 1: the memory's answers became infinite or NaN in training pass"
    fix = "a memory that grows by itself needs a lower max_rate, or smaller chunks"
    assert blamed[0] == f"{first} 5, before all else; {fix}"
    # A recording is rehearsed, which counts.
    assert blamed[1] == f"{first} 6, before all else; {fix}"


class Breaking(torch.optim.SGD):
    """SGD that makes a weight infinite at a step."""

    def __init__(self, parameters: list[nn.Parameter], *, weight: nn.Parameter, at: int) -> None:
        super().__init__(parameters, lr=0.01)
        self.weight, self.left = weight, at

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        self.left -= 1
        if not self.left:
            self.weight.fill_(torch.inf)


def test_a_strategy_that_owns_the_step_is_refused_by_name() -> None:
    data = study(strategies={"meta": REPLAY | {"class_path": "LaMAML"}}, training__compile="cudagraphs")
    with pytest.raises(ConfigError, match=r"^training\.compile: cudagraphs records .*strategies\.meta"):
        assemble(expand(load_study(data))[0], World())
