"""Tests that need a GPU: `make test-gpu`. They are left out of every other collection."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    raise pytest.UsageError("tests/gpu needs a CUDA device; without one, tests/kernels runs the kernels interpreted")

collect_ignore = ["test_two_gpus.py"] if torch.cuda.device_count() < 2 else []
"""It needs two of them, and all that the platform needs."""
