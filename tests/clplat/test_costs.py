"""What a run costs is its own, whatever its process did before."""

from __future__ import annotations

import gc

from clplat.costs import Costs

MIB = 2**20


def peak() -> int:
    """The peak of a run that does nothing."""
    costs = Costs()
    costs.start_memory()
    costs.measure_memory()
    return costs.peak_memory_bytes


def test_the_peak_of_a_run_leaves_out_what_an_earlier_run_of_the_process_left() -> None:
    before = peak()
    gc.disable()
    try:
        # A cycle, as models with their trainers are, and small blocks that malloc keeps when one behind them lives on.
        ring: list[object] = [bytearray(b"1" * (60 * MIB))]
        ring.append(ring)
        blocks = [bytearray(b"1" * 65_000) for _ in range(1000)]
        last = bytearray(b"1" * 65_000)
        del ring, blocks
        assert peak() < before + 20 * MIB and last
    finally:
        gc.enable()


def test_a_resumed_run_keeps_the_larger_peak() -> None:
    costs = Costs()
    costs.load({**vars(Costs()), "peak_memory_bytes": 2**60})
    costs.start_memory()
    costs.measure_memory()
    assert costs.peak_memory_bytes == 2**60
