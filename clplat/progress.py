"""What a person sees while a run goes on: task, step, loss, forgetting so far, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from clplat.errors import Pruned


class Progress(Protocol):
    """Told by the run loop about steps and boundaries."""

    def step(self, task: str, done: int, total: int, loss: float | None) -> None: ...

    def boundary(self, row: int, summary: Mapping[str, float]) -> None: ...


class Silent:
    """Shows nothing."""

    def step(self, task: str, done: int, total: int, loss: float | None) -> None:
        pass

    def boundary(self, row: int, summary: Mapping[str, float]) -> None:
        pass


class Asking:
    """Passes on what it is told, and asks after every boundary whether the run should go on: it ends there if not."""

    def __init__(self, inner: Progress, ask: Callable[[int], str]) -> None:
        """`ask(row)` gives the reason to end the run after this row of its result table, empty to go on."""
        self._inner, self._ask = inner, ask

    def step(self, task: str, done: int, total: int, loss: float | None) -> None:
        self._inner.step(task, done, total, loss)

    def boundary(self, row: int, summary: Mapping[str, float]) -> None:
        self._inner.boundary(row, summary)
        if reason := self._ask(row):
            raise Pruned(reason)


class Board:
    """One bar for each run that is under way, and one for the study."""

    def __init__(self, console: Console, runs: int | None) -> None:
        """`runs` in all; None where whoever supplies them tells how far it is."""
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._runs, self._closed = runs, 0
        self._study: TaskID | None = None
        if runs is not None and runs > 1:
            self._study = self._bars.add_task("study", total=runs, note="runs")

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def opened(self, name: str) -> RunBar:
        """The bar of a run that starts now."""
        return RunBar(self._bars, self._bars.add_task(name, total=None, note=""), name)

    def closed(self, bar: RunBar, status: str) -> None:
        """A run has ended. Where no bars are seen, as in a file, one that finished is a line on the error output."""
        self._bars.remove_task(bar.id)
        self._closed += 1
        console = self._bars.console
        if self._runs is not None and status == "FINISHED" and not console.is_terminal and not console.quiet:
            seconds = time.monotonic() - bar.begun
            print(
                f"{bar.name}: finished in {seconds:.0f} s, {self._closed} of {self._runs}", file=sys.stderr, flush=True
            )
        if self._study is not None:
            self._bars.advance(self._study)

    def dropped(self, bar: RunBar) -> None:
        """A run's bar goes, since it will be begun again."""
        self._bars.remove_task(bar.id)

    def say(self, text: str) -> None:
        """A line above the bars that stays."""
        self._bars.console.print(text, soft_wrap=True)


class RunBar:
    """The bar of one run."""

    def __init__(self, bars: Bars, identity: TaskID, name: str) -> None:
        self._bars, self.id, self.name, self._forgetting = bars, identity, name, ""
        self.begun = time.monotonic()

    def step(self, task: str, done: int, total: int, loss: float | None) -> None:
        note = f"loss {loss:.3f}" if loss is not None else ""
        self._bars.update(
            self.id, description=f"{self.name} · {task}", completed=done, total=total, note=note + self._forgetting
        )

    def boundary(self, row: int, summary: Mapping[str, float]) -> None:
        forgetting = summary.get("final_forgetting")
        if forgetting is not None and forgetting == forgetting:
            self._forgetting = f" · forgetting {forgetting:.3f}"
