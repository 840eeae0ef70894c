"""What strategies on adapters have in common: they ask for a model that has some, and add new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch

from clplat.architectures.base import Adapters
from clplat.strategies.base import Context


def adapters_of(context: Context, name: str) -> Adapters:
    """The architecture, which must have adapters of which one is trained; ValueError that names the strategy `name`
    else."""
    model = context.architecture
    if not isinstance(model, Adapters):
        raise ValueError(f"{name}: {type(model).__name__} has no adapters; use Pretrained with lora, or Adapted")
    if not model.adapter_names():
        raise ValueError(f"{name}: {type(model).__name__} has no adapters; use Pretrained with lora, or Adapted")
    return model


def first_adapter(context: Context, name: str) -> str:
    """The one adapter that is trained and answers as the run begins."""
    model = adapters_of(context, name)
    if len(model.trained) != 1 or model.active != model.trained:
        raise ValueError(f"{name}: needs a model of which one adapter answers and is trained, and here "
                         f"{list(model.active)} answer and {list(model.trained)} are trained; another strategy has "
                         "changed that before")  # fmt: skip
    return model.trained[0]


def new_adapter(context: Context, adapter: str) -> None:
    """One more adapter that changes nothing yet, drawn from the run's `strategy` source."""
    with drawn_by_strategy(context):
        cast(Adapters, context.architecture).add_adapter(adapter)


@contextmanager
def drawn_by_strategy(context: Context) -> Iterator[None]:
    """Within it torch's global sources give what the run's `strategy` source says, the same on all processes."""
    seed = int(torch.randint(2**62, (1,), generator=context.generator))
    with _undisturbed(context):
        torch.manual_seed(seed)
        yield


def copied_adapter(context: Context, adapter: str, original: str) -> None:
    """One more adapter, equal to another one; nothing is drawn, so that whoever draws next draws what it would have."""
    model = cast(Adapters, context.architecture)
    with _undisturbed(context), torch.no_grad():
        model.add_adapter(adapter)
        for copy, tensor in zip(
            model.adapter_parameters(adapter).values(), model.adapter_parameters(original).values(), strict=True
        ):
            copy.copy_(tensor)


def _undisturbed(context: Context) -> AbstractContextManager[None]:
    """Within it torch's global sources may be used: what the model draws in training, dropout for example, stays."""
    return torch.random.fork_rng(devices=[context.device()] if context.device().type == "cuda" else [])


def refuse_numbers_by_weight(context: Context, name: str) -> None:
    """ValueError beside a strategy that keeps a number for each trained weight: with other weights trained in every
    task, they would be held to what they never were; and beside another one that begins every task anew."""
    for other, strategy in context.strategies.items():
        if strategy.restarts and type(strategy).__name__ != name:
            raise ValueError(f"{name} trains another adapter in every task, and strategies.{other} "
                             f"({type(strategy).__name__}) begins every task anew too; leave one out")  # fmt: skip
        if strategy.fixed != "nothing":
            raise ValueError(f"{name} trains another adapter in every task, and strategies.{other} "
                             f"({type(strategy).__name__}) needs the same weights in all; leave one out")  # fmt: skip
