"""Named sources of randomness, each derived from the run's seed.

`init` makes the initial weights, `data` the order of rows, `strategy` replay draws and label samples, `model`
dropout and whatever a model draws in training. A strategy that draws more therefore changes no other arm's
data order, and differences between arms of one seed are paired.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the source `names`, independent of all other names."""
    text = ":".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the source `names`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_global(seed: int, *names: str | int) -> None:
    """Point torch's, numpy's and Python's global sources at `names` (modules such as dropout know no other)."""
    value = derive(seed, *names)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def global_state() -> dict[str, Any]:
    """The global sources as tensors and plain data."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }


def restore_global(state: Mapping[str, Any]) -> None:
    """The inverse of `global_state`; GPU sources only where the same number of GPUs is there."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the global sources as they were: what evaluation draws does not reach training."""
    state = global_state()
    try:
        yield
    finally:
        restore_global(state)
