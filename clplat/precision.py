"""The precision of a run: what its weights are kept in, and what its arithmetic is done in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from clplat.architectures.base import Architecture
from clplat.config import Precision
from clplat.streams.batch import Batch

_TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def keep_weights(architecture: Architecture, precision: Precision) -> None:
    """Turn weights into the dtype that a `true` precision names; again after growth, which may add others."""
    if precision in _TRUE:
        architecture.to(_TRUE[precision])


def read_rows(architecture: Architecture, precision: Precision) -> None:
    """Let the architecture take rows in its weights' dtype, whoever calls it: training, evaluation, a strategy.

    Rows stay float32 everywhere else, so that a memory of them is as large as in any other run.
    """
    if precision not in _TRUE:
        return

    def converted(_: Any, called: tuple[Any, ...]) -> tuple[Any, ...]:
        batch: Batch = called[0]
        if not batch.inputs.is_floating_point():
            return called
        return (batch.replaced(inputs=batch.inputs.to(_TRUE[precision])), *called[1:])

    architecture.register_forward_pre_hook(converted)


def of_trainer(precision: Precision) -> Precision:
    """What is left to Lightning's Trainer. It would convert the rows of training steps alone, and weights only then."""
    return "32-true" if precision in _TRUE or precision == "tf32" else precision


@contextmanager
def products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within it a GPU multiplies float32 matrices in TF32 where that is the run's precision, and in float32 where it is
    not, whatever the process had before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" and device.type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: Precision, device: torch.device) -> torch.autocast | nullcontext[None]:
    """What a forward pass outside the Trainer runs in."""
    if precision not in _MIXED:
        return nullcontext()
    return torch.autocast(device.type, dtype=_MIXED[precision])
