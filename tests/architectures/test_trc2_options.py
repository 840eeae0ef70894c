"""Options of TRC² that cannot be or contradict each other are refused by name; parts may be off over any base."""

from __future__ import annotations

import pytest
from trc2_models import DEFAULTS, TEXT

from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions, WriteOptions


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (HippocampusOptions, {"k_read": 9, "slots": 8}, "k_read: 9 exceeds slots"),
        (HippocampusOptions, {"temperature": 0.0}, "temperature: must be positive"),
        (HippocampusOptions, {"merge": "both"}, "merge: must be one of thalamic, residual"),
        (ThalamusOptions, {"focal": False, "diffuse": False}, "focal, diffuse"),
        (ThalamusOptions, {"groups": 0}, "groups: must be at least 1"),
        (ColumnOptions, {"experts_per_token": 9}, "experts_per_token: 9 exceeds num_experts"),
        (ThalamusOptions, {"clip": 0.0}, "thalamus.clip: must be positive, got 0.0; surprise: none"),
        (
            ColumnOptions,
            {"feed_forward": "dense", "num_experts": 4},
            "column.num_experts: 4 has no effect with feed_fo",
        ),
        (
            ColumnOptions,
            {"feed_forward": "dense", "shared_experts": 0},
            "shared_experts: 0 has no effect .* leave it at 1",
        ),
        (HippocampusOptions, {"event_threshold": 2.0}, "event_threshold: 2.0 has no effect with event_gate: soft"),
        (WriteOptions, {"merge": False, "merge_above": 0.5}, "write.merge_above: 0.5 has no effect with merge: false"),
        (
            WriteOptions,
            {"signal": "none", "delay": "immediate"},
            "write.delay: immediate has no effect with signal: none",
        ),
        (WriteOptions, {"slow_rate": 1.5}, "slow_rate: must lie in 0..1"),
        (WriteOptions, {"signal": "loss"}, "signal: must be one of fast_slow"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_part_may_be_switched_off_over_a_base_that_gives_its_options() -> None:
    thalamus = ThalamusOptions(enabled=False, surprise="pred", rank=16, groups=4, columns="early")
    hippocampus = HippocampusOptions(read=False, slots=7, k_read=3, event_gate="hard")
    written = WriteOptions(signal="nll", delay="immediate", quota=64)
    for path in ("thalamus", "full"):
        options = {"thalamus": thalamus, "hippocampus": hippocampus, "write": written, "replay_path": path}
        model = TRC2(spec=TEXT, hidden_size=16, num_layers=3, column=DEFAULTS["column"], **options)
        assert not model.routers and model.store is None and not model.measurements()


def test_slots_alone_make_a_small_store() -> None:
    parts = {"column": DEFAULTS["column"], "thalamus": DEFAULTS["thalamus"]}
    model = TRC2(spec=TEXT, hidden_size=16, hippocampus=HippocampusOptions(slots=8), **parts)
    assert len(model.store.content) == model.store.quota == 8
