"""Which column of TRC² gets which signal, and which options go together.

Columns are numbered 1..L. A router stands behind a column whose successor listens to it; the last one would speak to
nobody, and is not built.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from clplat.architectures.trc2.options import HippocampusOptions, ThalamusOptions, WriteOptions


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """The loops of a model of `num_layers` columns."""

    num_layers: int
    hidden_size: int
    thalamus: ThalamusOptions
    hippocampus: HippocampusOptions

    @property
    def numbers(self) -> range:
        return range(1, self.num_layers + 1)

    @property
    def after_column(self) -> int:
        """l_inj: the column behind which the store is read."""
        return self.hippocampus.after_column or self.num_layers // 2

    @property
    def feeds_queries(self) -> bool:
        """Whether what is read joins the thalamic signal of later columns."""
        return self.hippocampus.read and self.hippocampus.merge == "thalamic"

    @property
    def surprises(self) -> bool:
        """Whether the router behind column l_inj makes a surprise, for the event gate."""
        return self.thalamus.surprise != "none" and self.is_relayed(self.after_column)

    @property
    def parts(self) -> int:
        """Vectors that a slot holds: a hidden one, or a key and a value."""
        return 2 if self.hippocampus.stored == "projected" else 1

    def is_late(self, number: int) -> bool:
        return number > self.after_column

    def gets_signal(self, number: int) -> bool:
        """Whether the router behind the column before reaches column `number`."""
        late = self.is_late(number)
        wanted = {"all": True, "early": not late, "late": late}
        return self.thalamus.enabled and number > 1 and wanted[self.thalamus.columns]

    def is_relayed(self, number: int) -> bool:
        """Whether a router stands behind column `number`."""
        return number < self.num_layers and self.gets_signal(number + 1)

    def is_modulated(self, number: int) -> bool:
        """Whether anything can change the queries of column `number`."""
        return self.gets_signal(number) or (self.feeds_queries and self.is_late(number))

    def check(self, write: WriteOptions) -> None:
        """ValueError that names the field for options that do not go together."""
        if self.thalamus.columns != "all" and self.thalamus.enabled and not any(map(self.gets_signal, self.numbers)):
            raise ValueError(
                f"thalamus.columns: {self.thalamus.columns} names no column that has one before it (hippocampus."
                f"after_column: {self.after_column} of {self.num_layers}), so no router is built; use all, another "
                "after_column, more columns, or enabled: false"
            )
        if not self.hippocampus.read:
            return
        options, last = self.hippocampus, self.num_layers - self.feeds_queries
        if not 1 <= self.after_column <= last:
            raise ValueError(
                f"hippocampus.after_column: {self.after_column} is not in 1..{last}: what is read goes to later "
                f"columns of {self.num_layers}; use more columns, merge: residual, or read: false"
            )
        if options.event_gate == "hard" and not self.surprises:
            raise ValueError(
                f"hippocampus.event_gate: hard needs a thalamic surprise behind column {self.after_column}; use soft"
            )
        if write.quota is not None and write.quota > options.slots:
            raise ValueError(
                f"write.quota: {write.quota} exceeds hippocampus.slots ({options.slots}); leave it out for the default"
            )
        needed, there = 4 * options.slots * self.parts * self.hidden_size, psutil.virtual_memory().total
        if needed > there:
            raise ValueError(
                f"hippocampus.slots: {options.slots} slots of {self.hidden_size} numbers take {needed / 1e9:.1f} GB; "
                f"this machine has {there / 1e9:.1f} GB"
            )
