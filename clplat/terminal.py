"""The terminal that people read."""

from __future__ import annotations

from rich.console import Console


def terminal(*, quiet: bool = False) -> Console:
    """A console that shows text as it stands: in an error, or a path, brackets and colons are no mark-up."""
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False)
