"""Where the launcher's runs come from: a list, or whatever decides on the next run when one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from clplat.execution import Outcome


class Supply(Protocol):
    """Where runs come from, one after another, and who is told how each of them ended."""

    asks: bool
    """Whether runs ask at their boundaries if they should go on (`Asking`)."""

    def take(self) -> Path | None:
        """The next run folder; None when there is none (now: after another run has ended there may be one again)."""
        ...

    def boundary(self, folder: Path, row: int) -> str:
        """Why a run should end after this row of its table; empty to let it go on."""
        ...

    def ended(self, outcome: Outcome) -> None: ...


class Listed:
    """A fixed list of run folders."""

    asks = False

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders, self._waiting = list(folders), list(folders)
        self._outcomes: dict[Path, Outcome] = {}

    def take(self) -> Path | None:
        return self._waiting.pop(0) if self._waiting else None

    def boundary(self, folder: Path, row: int) -> str:
        return ""

    def ended(self, outcome: Outcome) -> None:
        self._outcomes[outcome.folder] = outcome

    def outcomes(self, code: int) -> list[Outcome]:
        """One outcome a folder, in their order; `code` is that of those which a stop left unstarted."""
        unstarted = {f: Outcome(folder=f, status="KILLED", reason="not started", code=code) for f in self._folders}
        return list((unstarted | self._outcomes).values())
