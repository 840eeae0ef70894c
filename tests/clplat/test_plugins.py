"""An outside package adds one of everything, each in one file, without an edit in clplat."""

from __future__ import annotations

from pathlib import Path

from studies import REPLAY, study

import clplat
from clplat.components import catalogue
from clplat.journal import read, table

STRATEGY = '''
"""Pull weights back to where the last task left them."""
import torch
from clplat.strategies.base import Strategy


class Anchor(Strategy):
    """L2 pull towards the weights after the last task."""

    knobs = ("strength",)

    def __init__(self, *, strength: float = 0.1) -> None:
        self.strength, self.anchor = strength, None

    def penalty(self, output, batch):
        if self.anchor is None:
            return None
        moved = torch._foreach_sub(list(self.context.architecture.parameters()), self.anchor)
        return self.strength * sum(part.square().sum() for part in moved)

    def task_end(self, task) -> None:
        self.anchor = [p.detach().clone() for p in self.context.architecture.parameters()]

    def state_dict(self):
        return {"anchor": self.anchor}

    def load_state_dict(self, state) -> None:
        self.anchor = state["anchor"]
'''

ARCHITECTURE = '''
"""A linear classifier."""
from torch import nn
from clplat.architectures.base import Architecture, Output
from clplat.streams.base import Spec


class Linear(Architecture):
    """One layer."""

    def __init__(self, *, spec: Spec, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(spec.num_outputs, bias=bias) if not spec.input_shape else nn.Linear(
            spec.input_shape[0], spec.num_outputs, bias=bias)

    def forward(self, batch, state=None, return_hidden=None) -> Output:
        return Output(logits=self.layer(batch.inputs))
'''

STREAM = '''
"""Gaussian blobs, two a task."""
import torch
from clplat.streams.base import EvalSet, Spec, Stream, Task, TensorData
from clplat.streams.scorers import Classify


class Blobs(Stream):
    """Two blobs a task around random centres."""

    def __init__(self, *, num_tasks: int = 3, seed: int = 0) -> None:
        self.num_tasks, self.seed = num_tasks, seed

    def prepare(self) -> None:
        self.spec = Spec(kind="classify", input_shape=(8,), num_outputs=2 * self.num_tasks, scenario="class")
        source = torch.Generator().manual_seed(self.seed)
        centres = 3 * torch.randn(2 * self.num_tasks, 8, generator=source)
        self.tasks = [self._task(index, centres, source) for index in range(self.num_tasks)]

    def _task(self, index: int, centres: torch.Tensor, source: torch.Generator) -> Task:
        labels = 2 * index + torch.arange(120) % 2
        points = centres[labels] + torch.randn(120, 8, generator=source)
        train, test = (TensorData(points[s], labels[s], task=index) for s in (slice(80), slice(80, None)))
        scored = EvalSet(name=f"blobs{index}", data=test, scorer=Classify())
        return Task(index=index, name=f"blobs{index}", train=train, test=scored,
                    classes=(2 * index, 2 * index + 1), headline="accuracy")
'''

CONTROLLER = '''
"""More replay when more is forgotten."""
from clplat.strategies.controllers.base import Action, Controller, Event


class Worried(Controller):
    """Replay ratio 1 + worst forgetting, decided at every boundary."""

    def __init__(self, *, strategy: str = "replay") -> None:
        self.strategy = strategy

    def observe(self, event: Event):
        if event.kind != "boundary":
            return []
        worst = max(event.forgetting.values(), default=0.0)
        return [Action(strategy=self.strategy, knob="ratio", value=1.0 + max(0.0, worst))]
'''

LIMITS = {STRATEGY: 40, ARCHITECTURE: 60, STREAM: 30, CONTROLLER: 30}


def test_one_of_each_from_outside_runs_and_is_logged_and_stays_within_the_line_limits(tmp_path: Path) -> None:
    package = tmp_path / "my_lab"
    package.mkdir()
    (package / "__init__.py").touch()
    files = {"anchor": STRATEGY, "linear": ARCHITECTURE, "blobs": STREAM, "worried": CONTROLLER}
    for name, text in files.items():
        code = [line for line in text.splitlines() if line.strip()]
        assert len(code) <= LIMITS[text], f"{name} takes {len(code)} lines"
        (package / f"{name}.py").write_text(text)
    data = study(
        stream={"class_path": "my_lab.blobs.Blobs"},
        architecture={"class_path": "my_lab.linear.Linear"},
        strategies={
            "replay": REPLAY,
            "anchor": {"class_path": "my_lab.anchor.Anchor"},
            "controller": {"class_path": "my_lab.worried.Worried"},
        },
    )
    done = clplat.run(data, quiet=True)
    assert done.code == 0, done.outcomes
    (outcome,) = done.outcomes
    decisions = [entry for entry in read(outcome.folder) if entry["kind"] == "decision"]
    assert [(d["strategy"], d["knob"]) for d in decisions] == [("replay", "ratio")] * 3
    assert table(outcome.folder).matrix("accuracy").shape == (4, 3)


def test_decisions_of_one_run_played_back_in_another_give_the_same_results(tmp_path: Path) -> None:
    (tmp_path / "worried_alone.py").write_text(CONTROLLER)
    first = (
        clplat.run(study(strategies={"replay": REPLAY, "c": {"class_path": "worried_alone.Worried"}}), quiet=True)
        .outcomes[0]
        .folder
    )
    recorded = str(first / "artifacts" / "decisions.jsonl")
    playback = {"class_path": "Playback", "init_args": {"decisions": recorded}}
    second = clplat.run(study(strategies={"replay": REPLAY, "c": playback}), quiet=True).outcomes[0].folder
    assert str(table(first).to_rows()) == str(table(second).to_rows())


def test_the_catalogue_lists_every_shipped_component_with_one_line() -> None:
    for wing, expected in {
        "stream": {"SplitDigits", "TextStream", "StdlibText"},
        "architecture": {"MLP", "Transformer"},
        "strategy": {"Naive", "Joint", "Cumulative", "ExperienceReplay", "DERpp", "EWC", "OnlineEWC", "Playback"},
    }.items():
        found = catalogue(wing)
        assert expected <= found.keys()
        assert all(entry.line for entry in found.values())


def test_the_catalogue_lists_no_abstract_base() -> None:
    assert not {"Decoder", "AttentionDecoder"} & catalogue("architecture").keys()
