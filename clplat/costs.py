"""What a run costs: counted while it runs, reported beside every score."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(kw_only=True)
class Costs:
    """Running totals of one run; they survive interruptions with the checkpoint.

    Seconds are wall time, of training steps alone (`training_seconds`, without evaluation and checkpoints) and
    of evaluation. `training_flops` is three times the forward operations (forward once, backward twice) of all
    rows, replayed ones included.
    """

    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    boundary_seconds: float = 0.0
    steps: int = 0
    rows_current: int = 0
    rows_replay: int = 0
    training_flops: float = 0.0
    peak_memory_bytes: int = 0

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the time inside to `KIND_seconds`; time of an inner kind is taken from an outer training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            setattr(self, f"{kind}_seconds", getattr(self, f"{kind}_seconds") + spent)

    def start_memory(self) -> None:
        """Forget the peak of what this process did before the run, where the system can (Linux, CUDA)."""
        # What an earlier run of this process left would be the floor of this one's peak: cycles of Python's, and
        # memory that is free and that malloc has not given back (in musl and on macOS it has no such call).
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def measure_memory(self) -> None:
        """Peak of device memory where there is a GPU, else of the process since the run began."""
        now = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_of_process()
        self.peak_memory_bytes = max(self.peak_memory_bytes, now)

    def metrics(self, *, tokens_per_row: int) -> dict[str, float]:
        """The totals under the names that reports use; a sample counts as one token."""
        rows = self.rows_current + self.rows_replay
        found = {f"cost/{name}": float(value) for name, value in asdict(self).items()}
        seconds = max(self.training_seconds, 1e-9)
        unit = "tokens" if tokens_per_row > 1 else "samples"
        found[f"cost/{unit}_per_second"] = rows * tokens_per_row / seconds
        found["cost/tokens_current"] = float(self.rows_current * tokens_per_row)
        found["cost/tokens_replay"] = float(self.rows_replay * tokens_per_row)
        found["cost/replay_ratio"] = self.rows_replay / max(1, self.rows_current)
        return found

    def load(self, state: dict[str, float]) -> None:
        """Continue from totals saved with a checkpoint."""
        for item in fields(self):
            setattr(self, item.name, state[item.name])


def _peak_of_process() -> int:
    """Largest resident bytes; only Linux's own account can be set back, and macOS counts in bytes instead of KiB."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
