"""Several studies and scripts on the cards of one machine, packed by the memory that a run of each takes.

    python benchmarks/gpu_plan.py benchmarks/plans/pretrained.yaml --out results --minutes 25 [--archive FILE]

A plan is a YAML list, most urgent first; of several plans the steps take turns. Each step has a `name` and either

    study: hope/recall          a shipped study or a file, run as `clplat run` does
    options: {seeds: [0]}       its dotted keys, as on the command line
    workers: 6                  runs side by side
    gib: 4                      what one run takes of a card's memory at its most

or `command: [benchmarks/multi_gpu.py, --parts, speed]`, a script with its arguments, and either `gib` or `cards`, how
many cards it has for itself; `minutes` ends it when they are over. A step begins on the first card where its runs find
memory and cores beside those that are under way; a study gives back what its finished runs took, and one of which a run
failed, for want of memory say, is resumed once when all others have begun. What is still running when the minutes are
over, or at Ctrl-C or SIGTERM, is stopped and saved. The same command line goes on from there: finished steps are passed
over, studies are resumed. Every step works in a folder of its name, which has its `log`, `mlflow.db` and `runs`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_study import begun, pack, unfinished

from clplat.study_file import run_folders

ROOT = Path(__file__).parents[1]
GRACE = 60.0
"""Seconds that a stopped step has to save itself."""
TURN = 2.0
"""Seconds between two looks at what is under way; each reads the journals of all runs."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a plan; memory in GiB."""

    name: str
    study: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    workers: int = 1
    gib: float = 0.0
    cards: int = 0
    minutes: float = float("inf")

    def __post_init__(self) -> None:
        if bool(self.study) == bool(self.command):
            raise ValueError(f"{self.name}: a step has either a study or a command")
        if not self.cards and self.gib <= 0:
            raise ValueError(f"{self.name}: say in gib what a run takes of a card, or in cards how many it has")

    def done(self, folder: Path) -> bool:
        """Whether nothing of it is left to do."""
        if self.command:
            return (folder / "done").is_file()
        studies = begun(folder / "runs")
        return bool(studies) and not any(left_of(study) for study in studies)

    def line(self, folder: Path) -> list[str]:
        """The command that begins it, or goes on with it."""
        if self.command:
            script, *rest = self.command
            return [sys.executable, str(ROOT / script), *rest]
        studies = sorted(begun(folder / "runs"))
        verb = ["resume", *map(str, studies)] if studies else ["run", self.study]
        options = {"launcher.workers": self.workers} | ({} if studies else self.options)
        words = [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]
        return [sys.executable, "-P", "-m", "clplat", *verb, *words]


def left_of(study: Path) -> int:
    """How many runs of a study have not finished."""
    return len(unfinished(study)) if run_folders(study) else 1


class Underway:
    """A step that runs on its cards."""

    def __init__(self, step: Step, folder: Path, cards: list[int]) -> None:
        self.step, self.folder, self.cards, self.started = step, folder, cards, time.monotonic()
        self.runs = step.workers
        """How many runs of it are under way, at most."""
        folder.mkdir(parents=True, exist_ok=True)
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(_device, cards))} if torch.cuda.is_available() else {}
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                step.line(folder), cwd=folder, stdout=log, stderr=log, env=os.environ | visible, start_new_session=True
            )

    def look(self) -> None:
        """Count the runs that are left."""
        studies = [study for study in begun(self.folder / "runs") if run_folders(study)]
        if studies:
            self.runs = max(1, min(self.step.workers, sum(map(left_of, studies))))

    def late(self) -> bool:
        """Whether its own minutes are over."""
        return time.monotonic() - self.started > self.step.minutes * 60

    def stop(self) -> None:
        """Have it save itself. A study tells its runs of a SIGTERM; a script is told with all that it began."""
        (os.killpg if self.step.command else os.kill)(self.process.pid, signal.SIGTERM)

    def ended(self) -> None:
        """Wait until it has; what does not end is killed."""
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Machine:
    """Cards, and what the steps under way have reserved of their memory and of the machine's cores."""

    def __init__(self, cards: int, gib: float, slots: int) -> None:
        self.cards, self.gib, self.slots = cards, gib, slots
        self.underway: list[Underway] = []

    def place(self, step: Step) -> list[int]:
        """Cards for a step now, none where it has to wait."""
        use = {card: [u for u in self.underway if card in u.cards] for card in range(self.cards)}
        if step.cards:
            idle = [card for card in use if not use[card]]
            return idle[: step.cards] if len(idle) >= step.cards else []
        for card, here in use.items():
            taken = sum(u.step.gib * u.runs for u in here)
            busy = sum(u.runs for u in here)
            needed = step.gib * step.workers
            fits = needed <= min(self.gib - taken, _free(card)) and busy + step.workers <= self.slots
            if fits and not any(u.step.cards for u in here):
                return [card]
        return []

    def never(self, step: Step) -> bool:
        """Whether it has no room here even alone."""
        return step.cards > self.cards or step.gib * step.workers > self.gib or step.workers > self.slots


def _device(card: int) -> str:
    """What the machine calls the card, of those that this process may see."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return visible[card] if card < len(visible) and visible[card] else str(card)


def _free(card: int) -> float:
    """GiB of a card that nobody has. The driver's tool is asked: a planner that opens the card holds a part of it, and
    ends when a run's fault ends all who have it open."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={_device(card)}"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return float("inf")


def work(steps: list[Step], machine: Machine, out: Path, minutes: float) -> list[str]:
    """Carry out the steps until they are done or the minutes are over; the names of those that are not done."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{(time.monotonic() - start) / 60:5.1f} min  {text}", flush=True)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    waiting = [step for step in steps if not step.done(out / step.name)]
    again: set[str] = set()
    try:
        while (waiting or machine.underway) and time.monotonic() - start < minutes * 60:
            for now in machine.underway if waiting else ():
                now.look()
            for step in list(waiting):
                if cards := machine.place(step):
                    machine.underway.append(Underway(step, out / step.name, cards))
                    waiting.remove(step)
                    say(f"{step.name} begins on card {', '.join(map(str, cards))}")
            for now in list(machine.underway):
                code = now.process.poll()
                if code is None and not now.late():
                    continue
                if code is None:
                    now.stop()
                    now.ended()
                machine.underway.remove(now)
                if code == 0 and now.step.command:
                    (now.folder / "done").touch()
                elif code and now.step.study and now.step.name not in again:
                    again.add(now.step.name)
                    waiting.append(now.step)
                say(f"{now.step.name} {'took too long' if code is None else f'ends with exit code {code}'}")
            time.sleep(TURN)
    except KeyboardInterrupt:
        say("stopped")
    for now in machine.underway:
        now.stop()
    for now in machine.underway:
        now.ended()
        say(f"{now.step.name} is stopped and saved")
    return [step.name for step in steps if not step.done(out / step.name)]


def read(plans: list[Path], parser: argparse.ArgumentParser) -> list[Step]:
    """The steps of all plans in turns; what is wrong with one is said by its name."""
    found = []
    for plan in plans:
        try:
            found.append([Step(**step) for step in yaml.safe_load(plan.read_text())])
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            parser.error(f"{plan}: {error}")
    steps = [step for turn in itertools.zip_longest(*found) for step in turn if step]
    names = [step.name for step in steps]
    if double := {name for name in names if names.count(name) > 1}:
        parser.error(f"two steps are named {double.pop()}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and save after so long")
    parser.add_argument("--gib", type=float, help="memory of a card to share out (default: what is free, less 5 %%)")
    parser.add_argument("--runs-per-card", type=int, help="default: the cores of the machine shared out")
    parser.add_argument("--archive", type=Path, help="pack all but checkpoints into this file at the end")
    parser.add_argument("--steps", nargs="*", help="these alone")
    options = parser.parse_args()
    steps = [step for step in read(options.plans, parser) if not options.steps or step.name in options.steps]
    cards = max(1, torch.cuda.device_count())
    slots = options.runs_per_card or max(1, (os.cpu_count() or 1) // cards)
    machine = Machine(cards, options.gib or 0.95 * min(map(_free, range(cards))), slots)
    if large := [step.name for step in steps if machine.never(step)]:
        parser.error(f"{', '.join(large)}: {cards} cards of {machine.gib:.0f} GiB and {slots} runs have no room for it")
    out = options.out.resolve()
    left = work(steps, machine, out, options.minutes)
    if options.archive:
        pack(options.archive, out, checkpoints=False)
    print(f"not done: {', '.join(left)}" if left else "all steps are done", flush=True)
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
