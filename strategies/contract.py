"""What every strategy must keep, as plain functions for tests: build it, and they drive it through a toy stream.

    def test_my_strategy_keeps_the_contract() -> None:
        check_strategy(lambda: MyStrategy(ratio=0.5), Objective, off={"ratio": 0.0})

Every check takes a function that builds the strategy and the default objective (`clplat.objective.Objective`), and, for
strategies that ask a model for more than `ToyModel` has, one that builds a small model from a spec. It
raises `AssertionError` with what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clplat.architectures.base import Architecture
from clplat.strategies.base import Strategy
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.toy_run import BATCH, STEPS, Kind, ToyRun
from clplat.streams.base import Spec
from clplat.streams.batch import CURRENT

Make = Callable[[], Strategy]
Model = Callable[[Spec], Architecture]


def check_strategy(
    make: Make,
    objective: Callable[..., Any],
    *,
    off: Mapping[str, float] | None,
    kind: Kind = "classify",
    model: Model | None = None,
) -> None:
    """Every check; `off` are the knobs at which the strategy does nothing (None for reference arms)."""
    check_resume(make, objective, kind, model)
    check_randomness(make, objective, kind, model)
    check_storage(make, objective, kind, model)
    check_knobs(make)
    if off is not None:
        check_disabled(make, objective, off, kind, model)
        check_composition(make, objective, kind, model)


def check_resume(
    make: Make, objective: Callable[..., Any], kind: Kind = "classify", model: Model | None = None
) -> None:
    """A run that is saved, rebuilt and loaded ends as one that was never interrupted, bit for bit."""
    whole = ToyRun([make()], objective, kind, model=model).train()
    for stop in (2, STEPS, STEPS + 2, 2 * STEPS):
        if stop < whole.length:
            saved = ToyRun([make()], objective, kind, model=model).train(stop).saved()
            resumed = ToyRun([make()], objective, kind, model=model).load(saved)
            assert resumed.saved() == saved, f"loading what was saved after step {stop} and saving again differs"
            assert resumed.train().saved() == whole.saved(), f"resumed after step {stop}, the run ends otherwise"


def check_randomness(
    make: Make, objective: Callable[..., Any], kind: Kind = "classify", model: Model | None = None
) -> None:
    """The strategy draws from `context.generator` alone, and twice the same run is the same."""
    before = torch.get_rng_state()
    first = ToyRun([make()], objective, kind, model=model).train().saved()
    assert torch.equal(before, torch.get_rng_state()), "drew from torch's global random source"
    torch.rand(1)
    assert ToyRun([make()], objective, kind, model=model).train().saved() == first, (
        "the same run twice ends differently"
    )


def check_storage(
    make: Make, objective: Callable[..., Any], kind: Kind = "classify", model: Model | None = None
) -> None:
    """After every step `stored_bytes` is what lies under `rows` in the state, and within the budget; 0 if none are."""
    strategy = make()
    run = ToyRun([strategy], objective, kind, model=model)
    for step in range(1, run.length + 1):
        run.train(step)
        stored, rows = strategy.stored_bytes(), list(_under_rows(strategy.state_dict()))
        actual = sum(tensor.nbytes for tensor in rows)
        assert stored == actual, f"stored_bytes says {stored}; the state holds {actual} bytes of rows"
        capacity, capacity_bytes = (getattr(strategy, n, None) for n in ("capacity", "capacity_bytes"))
        assert capacity is None or all(len(tensor) <= capacity for tensor in rows), f"more than {capacity} rows"
        assert capacity_bytes is None or stored <= capacity_bytes, f"{stored} bytes are more than {capacity_bytes}"
    assert bool(strategy.stored_bytes()) == strategy.replays, "`replays` must say whether rows are stored"


def _under_rows(state: Any, inside: bool = False) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield from [state] if inside else []
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _under_rows(value, inside or key == "rows")
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _under_rows(value, inside)


def check_knobs(make: Make) -> None:
    """What a controller may set is there, and is a number."""
    strategy = make()
    for knob in strategy.knobs:
        assert isinstance(getattr(strategy, knob), (int, float)), f"the knob {knob!r} is no number"


def check_disabled(
    make: Make,
    objective: Callable[..., Any],
    off: Mapping[str, float],
    kind: Kind = "classify",
    model: Model | None = None,
) -> None:
    """With its knobs at `off` the strategy changes no bit of the weights, and makes no batch larger."""
    strategy = make()
    for knob, value in off.items():
        setattr(strategy, knob, value)
    with_it, without = ToyRun([strategy], objective, kind, model=model), ToyRun([], objective, kind, model=model)
    for step in range(1, without.length + 1):
        with_it.train(step)
        assert len(with_it.mixed) == BATCH, f"at {dict(off)} it still adds rows"
    weights = without.train().weights()
    for name, tensor in with_it.weights().items():
        assert torch.equal(tensor, weights[name]), f"at {dict(off)} it still changes {name}"


def check_composition(
    make: Make, objective: Callable[..., Any], kind: Kind = "classify", model: Model | None = None
) -> None:
    """Before or after experience replay both add what they add alone, and current rows keep their place and origin."""
    alone = ToyRun([make()], objective, kind, model=model)
    # Rows are counted, which any model gives; some are nothing to train without their strategy.
    replay = ToyRun([_replay()], objective, kind)
    both = [ToyRun(pair, objective, kind, model=model) for pair in ([make(), _replay()], [_replay(), make()])]
    for step in range(1, alone.length + 1):
        added = sum(len(run.train(step).mixed) - BATCH for run in (alone, replay))
        for run in (alone, *(pair.train(step) for pair in both)):
            kept = run.mixed.rows(slice(0, BATCH))
            assert torch.equal(kept.inputs, run.current.inputs), "current rows must stay, and stand first"
            assert kept.origin is None or bool((kept.origin == CURRENT).all()), "current rows must stay CURRENT"
        for pair in both:
            assert len(pair.mixed) - BATCH == added, "beside experience replay another number of rows is added"
    for pair in both:
        finite = all(bool(tensor.isfinite().all()) for tensor in pair.weights().values())
        assert finite, "beside experience replay weights diverge"


def _replay() -> ExperienceReplay:
    return ExperienceReplay(capacity=6, ratio=0.5)
