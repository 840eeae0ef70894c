"""Errors that clplat explains in one paragraph: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ClplatError(Exception):
    """Base of all errors shown to a person without a traceback."""


class ConfigError(ClplatError):
    """A configuration that cannot be run; raised before any training."""


class NotFiniteError(ClplatError):
    """A loss or a weight became NaN or infinite; the last good checkpoint is untouched."""

    def __init__(self, what: str, penalties: Sequence[str] = (), cause: str | None = None) -> None:
        """`penalties`: the strategies whose penalties were part of the loss, any of which may be too strong. `cause`:
        where it began, if the model knows."""
        held = " and ".join(f"strategies.{name}" for name in penalties)
        super().__init__(
            f"{what}{f' ({cause})' if cause else ''}. What was saved before is untouched; "
            + (f"lower the strength of {held} or " if held else "lower ")
            + "training.optimizer.init_args.lr, or set training.clip_norm."
        )


class StudyFailedError(ClplatError):
    """Not one run of a study finished: each failed."""


class RunBusyError(ClplatError):
    """Another process works on this run."""


class StorageError(ClplatError):
    """The run folder cannot be written (full disk, permissions)."""


class Pruned(ClplatError):
    """A run of a search was ended at a boundary, since others had done better by then; the message says which."""


class Interrupted(BaseException):
    """Somebody asked the run to stop; its state is saved. Not an `Exception`, so nothing swallows it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name
        self.remedy = ""
        """How to go on, where something was begun."""


def nearest(name: str, known: Iterable[str], *, listed: bool = True) -> str:
    """`; did you mean 'x'?`, or (`listed`) the list of what is known when nothing is near."""
    options = sorted(known)
    lowered = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(lowered[match]) for match in close) + "?"
    return f"; known: {', '.join(options)}" if options and listed else ""
