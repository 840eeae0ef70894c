"""Means of loss terms that are logged without making the device wait."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clplat.errors import NotFiniteError


class LossMeans:
    """Means of loss terms of the steps up to `step`, copied to the host while the device goes on."""

    def __init__(self, names: list[str], values: Tensor, step: int) -> None:
        self.names, self.step = names, step
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self, cause: Callable[[], str | None]) -> dict[str, float]:
        """The means by name; waits until they have come. Raises NotFiniteError for one that is not finite, with what
        the model knows of the `cause`."""
        if self._arrived is not None:
            self._arrived.synchronize()
        means = dict(zip(self.names, self._values.tolist(), strict=True))
        for name, value in means.items():
            if not math.isfinite(value):
                penalties = [each.removeprefix("penalty_") for each in means if each.startswith("penalty_")]
                raise NotFiniteError(f"{name}: became {value} by step {self.step}", penalties, cause())
        return means
