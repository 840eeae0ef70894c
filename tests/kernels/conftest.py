"""The kernels' outputs, checked for what nobody wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for without a value is NaN, so that whatever a kernel forgot to write shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **named: Any) -> Tensor:
            made = make(*arguments, **named)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    # Torch remembers its constructors at their first use under `torch.device`: that must not be these.
    with torch.device("cpu"):
        torch.empty(())
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
