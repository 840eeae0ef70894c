"""What all launchers share: the next run, the bar that shows it, and what becomes of the way it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clplat.errors import ClplatError
from clplat.execution import Outcome
from clplat.journal import last_status, record_lost
from clplat.progress import Board, RunBar
from clplat.supply import Supply

REMEDY = "; `clplat resume"


class Desk:
    """Between a supply and a launcher. A run whose process was lost comes back here, `retries` times."""

    def __init__(self, supply: Supply, board: Board, *, retries: int) -> None:
        self._supply, self._board, self._retries = supply, board, retries
        self._bars: dict[Path, RunBar] = {}
        self._again: list[Path] = []
        self._lost: dict[Path, int] = {}

    @property
    def asks(self) -> bool:
        """Whether runs ask at their boundaries if they should go on; then what is next depends on what has ended."""
        return self._supply.asks

    def take(self) -> Path | None:
        """The next run folder; None when there is none now."""
        return self._again.pop(0) if self._again else self._supply.take()

    def bar(self, folder: Path) -> RunBar:
        """The bar of a run, on the board from now on: of a run that waits in a queue none is shown."""
        if folder not in self._bars:
            self._bars[folder] = self._board.opened(folder.name)
        return self._bars[folder]

    def boundary(self, folder: Path, row: int) -> str:
        """Why a run should end after this row of its table; empty to let it go on."""
        return self._supply.boundary(folder, row)

    def ended(self, outcome: Outcome) -> None:
        """A run has ended, or its process: it is begun again where that may help, else whoever supplied it is told."""
        folder, lost = outcome.folder, outcome.cause == "process" and outcome.status == "FAILED"
        bar = self.bar(folder)
        del self._bars[folder]
        if lost and self._lost.get(folder, 0) < self._retries:
            self._lost[folder] = self._lost.get(folder, 0) + 1
            self._again.append(folder)
            self._board.dropped(bar)
            self._board.say(f"{folder.name}: {outcome.reason.partition(REMEDY)[0]}; it goes on from what was saved")
            return
        self._board.closed(bar, outcome.status)
        if outcome.status not in ("FINISHED", "PRUNED"):
            self._board.say(f"{folder.name}: {outcome.status}. {outcome.reason}")
        self._supply.ended(outcome)

    def lost(self, folder: Path, why: str, *, stopped: int = 0, again: bool = True) -> None:
        """A run's process is gone without a word: `why`, or since it was `stopped` with that exit code.

        `again`: to begin once more may help.
        """
        if stopped and last_status(folder) == "WAITING":
            self.ended(Outcome(folder=folder, status="KILLED", reason="not started", code=stopped))
            return
        status, reason = "KILLED" if stopped else "FAILED", f"{why}{REMEDY} {folder}` goes on from what was saved"
        try:
            record_lost(folder, status, reason)
        except (ClplatError, OSError) as error:
            self.say(f"{folder.name}: {error}")  # a full disk; the other runs go on
        cause: Literal["process", ""] = "process" if again else ""
        self.ended(Outcome(folder=folder, status=status, reason=reason, code=stopped or 1, cause=cause))

    def say(self, text: str) -> None:
        """A line for a person, which stays."""
        self._board.say(text)
