"""What a study says of a variant whose settings are known to work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownGood:
    """A variant whose settings are known to work: what was published for them, and what they reach here."""

    variant: str
    published: float
    """Final score in per cent, as the source has it."""
    source: str
    recalled: bool = False
    """Whether the published number is from general knowledge of the source, and was not read in it."""
    tolerance: float = 2.0
    """Points by which a mean may differ from the published number and still reproduce it."""
    measured: str = ""
    """Mean ± standard deviation over seeds that the results page has, with the number of seeds where some are missing;
    empty until one was measured."""
    minutes: float
    """What one seed takes on the machine that the study's first line names."""
