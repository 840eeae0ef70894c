"""Small TRC² models with open loops, settings that cover all pairs of switches, and an oracle of the read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch

from clplat.architectures.base import StepOutcome
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions, WriteOptions
from clplat.architectures.trc2.wiring import Wiring
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

TEXT = Spec(kind="language", input_shape=(7,), num_outputs=19)
DEFAULTS: dict[str, Any] = {
    "column": ColumnOptions(num_heads=2, heads_per_kv=2, inner_size=8, num_experts=3),
    "thalamus": ThalamusOptions(rank=8, groups=4),
    "hippocampus": HippocampusOptions(slots=7, k_read=3),
    "write": WriteOptions(chunk=3, quota=4, threshold=0.0),
}
SWITCHES: dict[str, tuple[Any, ...]] = {
    "column.feed_forward": ("experts", "dense"),
    "column.shared_experts": (1, 0),
    "column.heads_per_kv": (2, 1),
    "thalamus.enabled": (True, False),
    "thalamus.focal": (True, False),
    "thalamus.diffuse": (True, False),
    "thalamus.surprise": ("td", "pred", "none"),
    "thalamus.trn": ("within", "across", "none"),
    "thalamus.modulation": ("add", "gain"),
    "thalamus.columns": ("all", "early", "late"),
    "thalamus.detach": (False, True),
    "hippocampus.read": (True, False),
    "hippocampus.after_column": (None, 2),
    "hippocampus.event_gate": ("soft", "hard", "none"),
    "hippocampus.stored": ("raw", "projected"),
    "hippocampus.gate": (True, False),
    "hippocampus.merge": ("thalamic", "residual"),
    "write.signal": ("fast_slow", "fast", "nll", "random", "none"),
    "write.candidate": ("peak", "mean"),
    "write.eviction": ("utility", "fifo", "surprise"),
    "write.merge": (True, False),
    "replay_path": ("bare", "thalamus", "full"),
    "document_mask": (True, False),
}
"""Every switch that a configuration can reach; `write.delay: immediate` leaks on purpose and is tested for that."""


def options_of(setting: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments for switches by dotted name."""
    options = dict(DEFAULTS)
    if setting.get("column.feed_forward") == "dense":
        options["column"] = replace(options["column"], num_experts=8)  # the default: a dense layer has none to count
    for name, value in setting.items():
        group, _, field = name.partition(".")
        options[group] = replace(options[group], **{field: value}) if field else value
    return options


def trc2(setting: dict[str, Any] | None = None, *, spec: Spec = TEXT, layers: int = 3, **options: Any) -> TRC2:
    return TRC2(
        spec=spec, hidden_size=16, num_layers=layers, **(options_of(setting or {}) | {"dropout": 0.0} | options)
    )


def opened(model: TRC2) -> TRC2:
    """The same model with everything that begins closed or empty opened and filled at random."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".modulation.weight" in name:
                weight.normal_(std=0.5)
        if model.store is not None and model.hippocampus is not None:
            model.hippocampus.strength.fill_(2.0)
            model.store.content.normal_()
            model.store.used[:5] = True
    return model


def fits(setting: dict[str, Any]) -> bool:
    """Whether the setting is one that the model accepts."""
    try:
        options = options_of(setting)
        parts = {name: options[name] for name in ("thalamus", "hippocampus")}
        Wiring(num_layers=3, hidden_size=16, **parts).check(options["write"])
    except ValueError:
        return False
    return True


def settings() -> Iterator[dict[str, Any]]:
    """Settings in which every two switches meet in every two values that go together (greedy covering array).

    What a switch of a part says counts only where that part is there.
    """
    left = {pair for a, b in combinations(SWITCHES, 2) for pair in product(*(_values(name) for name in (a, b)))}
    left = {pair for pair in left if fits(awake(pair))}
    while left:
        setting = awake(min(left, key=str))
        for name, values in SWITCHES.items():
            if name not in setting:
                ranked = [
                    (-sum(pair in left for pair in _met(setting | {name: value}) if name in dict(pair)), place)
                    for place, value in enumerate(values)
                    if fits(setting | {name: value})
                ]
                setting[name] = values[min(ranked)[1]]
        left -= set(_met(setting))
        yield setting


def _values(name: str) -> list[tuple[str, Any]]:
    return [(name, value) for value in SWITCHES[name]]


def awake(pair: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """A pair of settings, with the parts on that they are about."""
    needed = {}
    for name, value in pair:
        if value == "early":
            needed["hippocampus.after_column"] = 2  # behind the first, no column before it gets a signal
        if name.startswith("thalamus."):
            needed["thalamus.enabled"] = True
        if name.startswith(("hippocampus.", "write.")):
            needed["hippocampus.read"] = True
    return needed | dict(pair)


def _met(setting: dict[str, Any]) -> list[tuple[tuple[str, Any], ...]]:
    """The pairs that a setting tries out."""
    items = [(name, setting[name]) for name in SWITCHES if name in setting]
    return [pair for pair in combinations(items, 2) if setting | awake(pair) == setting]


def rows(count: int = 3, length: int = 7, *, seed: int = 0, outputs: int = 19) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(outputs, (count, length + 1), generator=draw)
    return Batch(inputs=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())


def write(model: TRC2, batch: Batch, step: int = 1) -> None:
    """The delayed write of one step, without the optimizer's part."""
    output = model.train()(batch)

    def row_loss() -> torch.Tensor:
        flat = torch.nn.functional.cross_entropy(
            output.logits.detach().flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        return flat.view_as(batch.targets)

    model.step_end(StepOutcome(step=step, batch=batch, output=output, row_loss=row_loss))
