"""How long a task is trained; apart from the other parts of a stream, so that a configuration is read without torch."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET_UNITS = ("steps", "epochs", "tokens")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train on a task: exactly one of the first three, and an optional early end.

    `until` stops a task early once the headline metric on its validation set (its test set is never used
    for this) reaches the threshold: at or above for metrics where higher is better, at or below otherwise. A mapping
    names metrics of the validation set's scorer in its place, and all of them must reach their thresholds.
    """

    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    until: float | dict[str, float] | None = None

    def __post_init__(self) -> None:
        given = [name for name in BUDGET_UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, epochs or tokens; got {given or 'none'}")
        if getattr(self, given[0]) <= 0:
            raise ValueError(f"{given[0]} must be positive, got {getattr(self, given[0])}")
        if self.until == {}:
            raise ValueError("until names no metric; give a threshold, or metrics with their thresholds")

    def amount(self) -> tuple[float, str]:
        """How much of what, such as 2 and `epochs`."""
        return next((getattr(self, name), name) for name in BUDGET_UNITS if getattr(self, name) is not None)

    def thresholds(self, headline: str) -> dict[str, float]:
        """What ends a task early, by metric; empty where nothing does."""
        if self.until is None:
            return {}
        return dict(self.until) if isinstance(self.until, dict) else {headline: self.until}

    def __str__(self) -> str:
        """As a person says it: `2 epochs`, `300 steps, at most until 0.9`."""
        number, unit = self.amount()
        amount = f"{number:,.10g} {unit if number != 1 else unit.removesuffix('s')}"
        until = " and ".join(f"{name} {value:g}".lstrip() for name, value in self.thresholds("").items())
        return f"{amount}, at most until {until}" if until else amount
