"""What a person does with a study in MLflow, step by step in a real browser; every step checks what there is to see.

    python tests/support/mlflow_walk.py docs/images      # the pictures of docs/mlflow.md, of a study of half a minute

`walk` is the end-to-end test of `make test-all` too (tests/clplat/test_mlflow_pages.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chromium import Browser

from clplat.api import run
from clplat.mlflow_store import client
from clplat.tracking import RUN_STATE, STUDY_STATE

DEMO = {
    "name": "demo", "baseline": "naive", "seeds": [0, 1, 2], "evaluation": {"every": 10},
    "stream": {"class_path": "SplitDigits", "init_args": {"num_tasks": 5}},
    "architecture": {"class_path": "MLP", "init_args": {"hidden_sizes": [64]}},
    "training": {"budget": {"steps": 40}, "batch_size": 32, "accelerator": "cpu",
                 "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}},
    "tracking": {"log_every": 5, "system_metrics": False}, "launcher": {"workers": 1},
    "variants": {
        "naive": {},
        "er": {"strategies": {"replay": {"class_path": "ExperienceReplay", "init_args": {"capacity": 60}}}},
        "ewc": {"strategies": {"ewc": {"class_path": "OnlineEWC", "init_args": {"strength": 1.0}}}},
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The demo study as it lies in a folder and in MLflow."""

    folder: Path
    uri: str
    run_id: str
    er_run_id: str


def record(place: Path) -> Recorded:
    """Train the demo study in `place`, with its report."""
    from rich.console import Console

    from clplat.study import conclude

    uri = f"sqlite:///{place / 'mlflow.db'}"
    tracking = DEMO["tracking"] | {"uri": uri}  # type: ignore[operator]
    done = run(DEMO | {"folder": str(place / "runs"), "tracking": tracking}, quiet=True)
    conclude(done, Console(quiet=True))
    ids = [json.loads(file.read_text())["run_id"]
           for file in (done.folder / STUDY_STATE, done.folder / "er-s0" / RUN_STATE)]  # fmt: skip
    return Recorded(folder=done.folder, uri=uri, run_id=ids[0], er_run_id=ids[1])


@contextlib.contextmanager
def served(uri: str, log: Path) -> Iterator[tuple[str, str]]:
    """`clplat ui` on a free port: the server's address, and that of the newest study as it prints them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "clplat", "ui", "--uri", uri, "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=out, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"http://\S+#/\S+", line)
            if found:
                yield found.group().partition("#")[0], found.group()
                return
        raise RuntimeError(f"clplat ui ended without the address of a study: {log.read_text()}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


class Walk:
    """The steps, in one browser; pictures go into `pictures` where it is given."""

    def __init__(self, browser: Browser, study: Recorded, pictures: Path | None = None) -> None:
        self.browser, self.study, self.pictures = browser, study, pictures
        self.client = client(study.uri)

    def photograph(self, name: str) -> None:
        if self.pictures is not None:
            self.browser.pause(1.5)
            self.browser.photograph(self.pictures / name)

    def find_the_study(self, address: str) -> None:
        """The address that `clplat ui` prints opens the table of the study's runs, not pages for language models."""
        browser = self.browser
        browser.open(address.partition("#")[0])
        # What a person does once: MLflow's own assistant opens over a third of the page.
        browser.ask("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
        browser.ask("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        browser.open(address)
        runs = [f"{variant}-s{seed}" for variant in ("naive", "er", "ewc") for seed in (0, 1, 2)]
        browser.wait_for_text(*runs, "9 matching runs", "final_score", "final_forgetting")
        assert "No data available" not in browser.text()
        self.photograph("mlflow_runs.png")

    def compare_its_runs(self) -> None:
        """One click leads to the charts; forgetting over the stream is among them, a line a run, with true numbers."""
        browser = self.browser
        browser.click("document.querySelector('input[value=CHART]').closest('label')", "the button for charts")
        browser.wait_for_text("Model metrics", "final_forgetting")
        parent = f"tags.`mlflow.parentRunId` = '{self.study.run_id}'"
        runs = self.client.search_runs([self.client.get_run(self.study.run_id).info.experiment_id], parent)
        held = {run.info.run_name: run.data.metrics["final_forgetting"] for run in runs}
        # MLflow draws each line twice, with and without its points.
        ends = (
            "[...document.querySelectorAll('.js-plotly-plot')].map(plot => Object.fromEntries((plot.data || [])"
            ".filter(line => line.y && line.y.length).map(line => [line.name, Array.from(line.y).at(-1)])))"
        )
        browser.wait_for(
            lambda: any(same(plot, held) for plot in browser.ask(ends)), f"a chart of forgetting that ends in {held}"
        )
        self.photograph("mlflow_charts.png")

    def read_the_study(self, base: str) -> None:
        """The study's own run says what came out, has the table, and the report among its artifacts."""
        page = f"{base}#/experiments/1/runs/{self.study.run_id}"
        self.browser.open(f"{page}?workflowType=machine_learning")
        self.browser.wait_for_text("Best final score", "Open the report", "learning score", "Child runs")
        self._show_description()
        self.photograph("mlflow_study.png")
        self.browser.open(f"{page}/artifacts/report.html?workflowType=machine_learning")
        self.browser.wait_for_text("report.html", "Result tables", "Score and cost")
        self.photograph("mlflow_report.png")

    def read_a_run(self, base: str) -> None:
        """A run's page begins with its scores and pictures, and names the data sets it read."""
        self.browser.open(f"{base}#/experiments/1/runs/{self.study.er_run_id}?workflowType=machine_learning")
        self.browser.wait_for_text("seed 0", "after classes-8-9", "Datasets", "training", "evaluation")
        self._show_description()
        self.photograph("mlflow_run.png")

    def _show_description(self) -> None:
        """Unfold the description; both pictures in it must have come."""
        browser = self.browser
        more = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Show more')"
        browser.click(more, "the button that unfolds the description")
        pictures = "[...document.querySelectorAll('img')].filter(i => i.src.includes('get-artifact'))"
        browser.wait_for(
            lambda: browser.ask(f"{pictures}.filter(i => i.complete && i.naturalWidth > 100).length") == 2, "pictures"
        )

    def open_the_report_without_network(self) -> None:
        """report.html asks for nothing and complains of nothing."""
        self.browser.without_network()
        opens_alone(self.browser, self.study.folder / "report.html", "Best final score", "Scores", "Costs",
                    "Differences to naive", "Where the differences come from", "Score and cost")  # fmt: skip


def opens_alone(browser: Browser, page: Path, *words: str) -> None:
    """The page shows these words and a figure for each file of one, without a request or an error, in wide and in
    narrow windows; figures are told to who cannot see them, and every link leads to a place on the page."""
    browser.open(page.as_uri())
    browser.wait_for_text(*words)
    browser.pause(1.0)
    drawn = len(list((page.parent / "figures").glob("*.svg")))
    assert browser.ask("document.querySelectorAll('svg').length") == drawn >= 2
    assert browser.ask("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label').length > 20)")
    assert browser.ask("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    for width in (1400, 390):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=850, deviceScaleFactor=1, mobile=False)
        browser.pause(0.3)
        assert browser.ask("document.documentElement.scrollWidth") <= width, f"wider than a window of {width}"
    assert browser.errors == [], browser.errors
    asked = [address for address in browser.requests if not address.startswith(("file:", "data:"))]
    assert asked == [], asked


def same(drawn: dict[str, float], held: dict[str, float]) -> bool:
    """Whether a chart's lines end in these numbers."""
    return drawn.keys() == held.keys() and all(abs(drawn[name] - held[name]) < 1e-6 for name in held)


def walk(place: Path, pictures: Path | None = None) -> None:
    """All steps on a study recorded in `place`."""
    study = record(place)
    with served(study.uri, place / "ui.log") as (base, address), Browser(place / "profile", width=1500) as browser:
        steps = Walk(browser, study, pictures)
        steps.find_the_study(address)
        steps.compare_its_runs()
        steps.read_the_study(base)
        steps.read_a_run(base)
        steps.open_the_report_without_network()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        walk(Path(scratch), Path(sys.argv[1]).resolve())
