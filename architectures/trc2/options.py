"""The switches of TRC², one dataclass for each part; a value that cannot be raises ValueError with the field's name.

Of what the paper states the wiring is known and most inner formulas are not: docs/trc2.md says which of these defaults
are its own and which are inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from clplat.architectures.option_checks import check_at_least, check_choices, check_finite, check_idle, check_shares

FeedForward = Literal["experts", "dense"]
Modulation = Literal["add", "gain"]
Surprise = Literal["td", "pred", "none"]
Competition = Literal["within", "across", "none"]
Modulated = Literal["all", "early", "late"]
EventGate = Literal["none", "soft", "hard"]
Stored = Literal["raw", "projected"]
Merge = Literal["thalamic", "residual"]
Signal = Literal["fast_slow", "fast", "nll", "random", "none"]
Delay = Literal["deferred", "immediate"]
Candidate = Literal["peak", "mean"]
Eviction = Literal["utility", "fifo", "surprise"]
ReplayPath = Literal["bare", "thalamus", "full"]


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """The decoder block.

    `num_heads` defaults to hidden_size / 64; `heads_per_kv` of them share a key-value head. `feed_forward`: routed
    experts and shared ones, or one dense SwiGLU. `inner_size`, of one expert or of the dense layer, defaults to
    256 · ⌈8 · hidden_size / 768⌉, which fits the published sizes. `balance`: coefficient of the balance loss.
    """

    group: ClassVar[str] = "column"

    num_heads: int | None = None
    heads_per_kv: int = 4
    feed_forward: FeedForward = "experts"
    num_experts: int = 8
    experts_per_token: int = 2
    shared_experts: int = 1
    inner_size: int | None = None
    balance: float = 0.01
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, feed_forward=FeedForward)
        check_at_least(self, 1, "num_heads", "heads_per_kv", "num_experts", "experts_per_token", "inner_size")
        check_at_least(self, 0, "shared_experts", "balance")
        if self.feed_forward == "dense":
            idle = ("num_experts", "experts_per_token", "shared_experts", "balance")
            check_idle(self, "feed_forward: dense", "feed_forward: experts", *idle)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"column.experts_per_token: {self.experts_per_token} exceeds num_experts ({self.num_experts})"
            )


@dataclass(frozen=True, kw_only=True)
class ThalamusOptions:
    """The router behind each column, whose signal modulates the next column's queries.

    `rank` r defaults to hidden_size / 4. `focal` and `diffuse` are its two paths, `surprise` what shifts between them:
    a TD error, the prediction error alone, or nothing. `trn`: divisive competition within each of `groups` groups,
    across them, or none. `modulation` of the queries by addition or gain; `columns` that are modulated: all but the
    first, those up to the hippocampus, or those behind it. `detach` keeps the signal's gradient from the column that
    it was made of. `discount` γ of the critic, `critic_weight` of its losses, `clip` of the surprise in RMS.
    """

    group: ClassVar[str] = "thalamus"

    enabled: bool = True
    rank: int | None = None
    groups: int = 8
    focal: bool = True
    diffuse: bool = True
    surprise: Surprise = "td"
    trn: Competition = "within"
    modulation: Modulation = "add"
    columns: Modulated = "all"
    detach: bool = False
    discount: float = 0.9
    critic_weight: float = 0.1
    clip: float = 3.0

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, surprise=Surprise, trn=Competition, modulation=Modulation, columns=Modulated)
        check_at_least(self, 1, "rank", "groups")
        check_at_least(self, 0, "critic_weight")
        check_shares(self, "discount")
        if self.clip <= 0:
            raise ValueError(f"thalamus.clip: must be positive, got {self.clip}; surprise: none leaves surprise out")
        if self.enabled and not (self.focal or self.diffuse):
            raise ValueError("thalamus.focal, diffuse: without both paths there is no signal; use enabled: false")


@dataclass(frozen=True, kw_only=True)
class HippocampusOptions:
    """Reading of the episodic store behind column `after_column` (default: half of the columns).

    `slots` of the store, `k_read` of them for each token, softmax `temperature` τ. `event_gate` on what is read: none,
    a learned probability, or 1 where the surprise exceeds `event_threshold` (straight-through). `stored`: hidden
    vectors, which are projected when they are read, or keys and values, whose projections then get no gradient.
    `gate`: G on what is fed back. `merge`: with the thalamic signal of later columns, or (a control) into the residual
    stream. `strength`: the scalar a at the beginning; what is fed back is scaled by σ(a).
    """

    group: ClassVar[str] = "hippocampus"

    read: bool = True
    after_column: int | None = None
    slots: int = 512
    k_read: int = 8
    temperature: float = 0.1
    event_gate: EventGate = "soft"
    event_threshold: float = 1.0
    stored: Stored = "raw"
    gate: bool = True
    merge: Merge = "thalamic"
    strength: float = -4.0

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, event_gate=EventGate, stored=Stored, merge=Merge)
        check_at_least(self, 1, "after_column", "slots", "k_read")
        if self.k_read > self.slots:
            raise ValueError(f"hippocampus.k_read: {self.k_read} exceeds slots ({self.slots}); lower it with them")
        if self.event_gate != "hard":
            check_idle(self, f"event_gate: {self.event_gate}", "event_gate: hard", "event_threshold")
        if self.temperature <= 0:
            raise ValueError(f"hippocampus.temperature: must be positive, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What is written into the store after an optimizer step.

    `signal` w of a token: |δ_fast − δ_slow| of two TD critics of its loss, |δ_fast|, its loss, chance, or none, which
    writes nothing. `delay: immediate` is a control that leaks: while it trains, the read sees a mean of every chunk of
    its own batch. A row is cut into pieces of `chunk` tokens; a piece offers its hidden vector at the largest w
    (`peak`) or its mean, and at most `quota` pieces a step (default: 16, or all slots of fewer) are written whose mean
    w lies more than `threshold` standard deviations above the running mean. A full store merges what resembles a slot
    by a cosine above `merge_above` into it (the new one's share is `merge_share`; `merge: false` never does), and else
    overwrites the slot that `eviction` names: least used, oldest, or least surprising. `discount` γ, `critic_rate` the
    fast critic's learning rate, `slow_rate` τ of the slow one's average, `utility_decay` and `utility_bonus` of a
    slot's utility.
    """

    group: ClassVar[str] = "write"

    signal: Signal = "fast_slow"
    delay: Delay = "deferred"
    chunk: int = 64
    candidate: Candidate = "peak"
    quota: int | None = None
    threshold: float = 1.0
    eviction: Eviction = "utility"
    merge: bool = True
    merge_above: float = 0.95
    merge_share: float = 0.1
    discount: float = 0.9
    critic_rate: float = 1e-3
    slow_rate: float = 0.999
    utility_decay: float = 0.99
    utility_bonus: float = 0.1

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, signal=Signal, delay=Delay, candidate=Candidate, eviction=Eviction)
        check_at_least(self, 1, "chunk", "quota")
        check_at_least(self, 0, "critic_rate", "utility_bonus")
        check_shares(self, "discount", "slow_rate", "utility_decay", "merge_share", "merge_above")
        if not self.merge:
            check_idle(self, "merge: false", "merge: true", "merge_above", "merge_share")
        if self.signal == "none":
            check_idle(self, "signal: none, which writes nothing,", "another signal", "delay")
