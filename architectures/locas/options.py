"""Options of side memories, and what may be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clplat.architectures.option_checks import check_at_least, check_choices

Start = Literal["clone", "bottom", "random_clone", "gaussian", "gradient"]
Scale = Literal["adaptive", "one", "one_over_rank"]
Compression = Literal["nl_svd", "nl_svd_refit", "prune_refit"]
CLONES = ("clone", "bottom", "random_clone")


@dataclass(frozen=True, kw_only=True)
class SideMemory:
    """Options of the memories of all layers; defaults are those of Locas-GLU (Lu et al. 2026, §4).

    `rank`: slots of a memory. `start`: what the first batch makes of them. In gated layers, and in others, `clone`
    takes the `rank` rows of the layer's own keys (and gates) that are most active on it, `bottom` the least active
    ones, `random_clone` any, each at unit length, and `gaussian` random directions; values begin at 0, so that nothing
    changes yet. `gradient`, for layers without a gate, writes a slot for every token (its input as key, the gradient
    of its log-probability as value) and reduces them to `rank` by `compression`. It changes the answers at once, by
    `write_share` of what the layers add (INFERRED: the paper leaves the step open). `detach_future` takes each token's
    gradient from a pass of its own, without what later tokens add to it; costs as many passes as tokens.
    `scale` is the factor τ of a memory's answer: the mean norm of the layer's own values over `rank`, 1, or 1/`rank`.
    `clip` shortens rows longer than 1 after every optimizer step.
    """

    rank: int = 64
    start: Start = "clone"
    scale: Scale = "adaptive"
    clip: bool = True
    compression: Compression = "prune_refit"
    detach_future: bool = False
    write_share: float = 0.05

    group = "memory"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rank")
        check_choices(self, start=Start, scale=Scale, compression=Compression)
        if self.start != "gradient" and (self.compression, self.detach_future) != ("prune_refit", False):
            wrong = "detach_future" if self.detach_future else "compression"
            raise ValueError(f"memory.{wrong}: is about the slots that start: gradient writes, one a token, and "
                             f"start: {self.start} begins with as many as stay; leave it out, or use start: gradient "
                             "(layers without gates: GPT-2, GPT-NeoX, Phi)")  # fmt: skip
        if not 0 < self.write_share <= 1:
            raise ValueError(f"memory.write_share: must lie in (0, 1], got {self.write_share}")

    def check_room(self, rows: int, size: int) -> None:
        """ValueError where a layer of `rows` rows of `size` numbers cannot fill the slots: empty ones learn nothing."""
        if self.start in CLONES and self.rank > rows:
            raise ValueError(f"memory.rank: {self.rank} slots cannot be cloned from a layer of {rows} rows; give "
                             f"{rows} at most, or start: gaussian")  # fmt: skip
        if self.start == "gradient" and self.compression != "prune_refit" and self.rank > size:
            raise ValueError(f"memory.rank: {self.compression} gives a layer of size {size} no {self.rank} slots; give "
                             f"{size} at most, or compression: prune_refit")  # fmt: skip

    def factor(self, value_norm: float, rank: int) -> float:
        """τ of a memory of `rank` slots beside a layer whose values have the mean norm `value_norm`."""
        return {"adaptive": value_norm / rank, "one": 1.0, "one_over_rank": 1.0 / rank}[self.scale]
