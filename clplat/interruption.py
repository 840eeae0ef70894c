"""Stopping on request: the first signal asks for a checkpoint and a clean end, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from clplat.errors import Interrupted

EXIT_REQUEUE = 75
"""Exit code after SIGTERM and SIGUSR1: saved and ready to be started again (EX_TEMPFAIL)."""
EXIT_INTERRUPT = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None

    def check(self, save: Callable[[], None] = lambda: None) -> None:
        """Save and leave when a stop was asked for."""
        if self.requested is not None:
            save()
            self.leave()

    def leave(self) -> None:
        """End the run now; the caller has saved what there is to save."""
        raise Interrupted(self.requested or "SIGTERM")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over while inside; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with signals_to(self._asked):
            yield

    def _asked(self, number: int, frame: FrameType | None) -> None:
        # A Ctrl-C may come twice, from the terminal and as what `passed_on` makes of it: that is one request.
        if self.requested == "SIGINT":
            if number == signal.SIGINT:
                os._exit(EXIT_INTERRUPT)
            return
        self.requested = signal.Signals(number).name


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While inside, a request to stop raises `Interrupted` where it is met: for work that has nothing to save.

    Whoever has something to save listens for itself meanwhile. A second request ends the process.
    """

    def asked(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        for kind in SIGNALS:
            signal.signal(kind, lambda *_: os._exit(exit_code(name)))
        raise Interrupted(name)

    with signals_to(asked):
        yield


@contextmanager
def signals_to(asked: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While inside, a request to stop is told to `asked`; afterwards to whom it was before."""
    before: dict[int, Any] = {number: signal.signal(number, asked) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def passed_on(number: int) -> int:
    """The signal by which a process tells its children of a request to stop that it has met itself.

    Whether SIGINT came from a terminal, which tells the whole process group, or to this process alone, nobody can see.
    Sent once more as SIGINT it would be a second request; as SIGTERM it is the first one, whoever comes first.
    """
    return signal.SIGTERM if number == signal.SIGINT else number


def exit_code(signal_name: str) -> int:
    """The code with which a process that was asked to stop ends."""
    return EXIT_INTERRUPT if signal_name == "SIGINT" else EXIT_REQUEUE
