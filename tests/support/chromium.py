"""A headless Chromium on its debugging pipe: pages are opened, asked and photographed as a person's browser would.

Chrome's DevTools protocol (https://chromedevtools.github.io/devtools-protocol) travels over two pipes, so nothing but
the browser itself has to be installed. It is looked for on the path, or named by the variable CLPLAT_CHROMIUM.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = "apt-get install chromium, brew install --cask chromium, or set CLPLAT_CHROMIUM to a Chrome or Chromium"
PATIENCE = 90.0
"""Seconds in which a page has to show what is waited for; MLflow takes its time on a busy machine."""


def find_chromium() -> str:
    """The browser's program; raises with how to install it."""
    found = os.environ.get("CLPLAT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(f"no Chromium on this machine: {INSTALL}")
    return found


class Browser:
    """One browser with one page; a context manager, which ends the browser and its processes."""

    def __init__(self, profile: Path, *, width: int = 1400, height: int = 850) -> None:
        self.errors: list[str] = []
        """What went to the page's console as an error, and exceptions that nothing caught, since the last `open`."""
        self.requests: list[str] = []
        """Addresses that the page asked for since the last `open`."""
        self._number, self._buffer = 0, b""
        self._start(profile, f"--window-size={width},{height}")
        (target,) = [t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._call("Browser.close")
        for end in (self._to, self._from):
            os.close(end)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _start(self, profile: Path, *options: str) -> None:
        """Start the program with its commands on descriptor 3 and its answers on 4."""
        program, self._session = find_chromium(), None
        profile.mkdir(parents=True, exist_ok=True)
        # High numbers first, so that no end is overwritten by the other's place.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs_in, self._to, self._from, theirs_out = ends
        with (profile / "chromium.log").open("w") as log:
            actions = [
                (os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
            ]  # fmt: skip
            command = [
                program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox",
                "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
                # MLflow shows a report in a sandboxed frame, which would be a target of its own.
                "--disable-features=IsolateSandboxedIframes", *options,
                "about:blank",
            ]  # fmt: skip
            self._pid = os.posix_spawn(program, command, os.environ, file_actions=actions, setpgroup=0)
        for end in (theirs_in, theirs_out):
            os.close(end)

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol to the page; its result."""
        return self._call(method, **params)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline - time.monotonic())
            if answer is None:
                raise TimeoutError(f"{method}: the browser does not answer")
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next message, events noted; None when none comes in time. Raises `OSError` when the browser is gone."""
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, seconds))[0]:
                return None
            part = os.read(self._from, 1 << 20)
            if not part:
                raise BrokenPipeError("the browser ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
            case "Runtime.exceptionThrown":
                thrown = params["exceptionDetails"]
                self.errors.append(thrown.get("exception", {}).get("description", thrown["text"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    def open(self, address: str) -> None:
        """Go to an address; what was noted of the page before is forgotten."""
        self.errors, self.requests = [], []
        found = self.call("Page.navigate", url=address)
        if found.get("errorText"):
            raise RuntimeError(f"{address}: {found['errorText']}")
        self.wait_for(lambda: self.ask("document.readyState") == "complete", f"{address} to load")

    def without_network(self) -> None:
        """From now on no page reaches any network; files still open."""
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.call("Network.setBlockedURLs", urls=["http://*", "https://*", "ws://*", "wss://*"])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def text(self) -> str:
        """What the page shows as text, its embedded frames included."""
        tree = self.call("Page.getFrameTree")["frameTree"]
        texts = [str(self.ask("document.body ? document.body.innerText : ''"))]
        for frame in tree.get("childFrames", []):
            world = self.call("Page.createIsolatedWorld", frameId=frame["frame"]["id"])["executionContextId"]
            found = self.call(
                "Runtime.evaluate", expression="document.body.innerText", contextId=world, returnByValue=True
            )
            texts.append(str(found["result"].get("value", "")))
        return "\n".join(texts)

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """The first truthy answer of `condition`; raises `TimeoutError` with what the page shows instead."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}; the page shows: {self.text()[:2000]}")
            self.pause(0.2)
        return found

    def wait_for_text(self, *words: str) -> None:
        """Wait until the page shows all of these."""
        for word in words:
            self.wait_for(lambda word=word: word in self.text(), f"the text {word!r}")  # type: ignore[misc]

    def pause(self, seconds: float) -> None:
        """Let the page go on, and note what it does."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._read(left)

    def click(self, expression: str, what: str) -> None:
        """Press the mouse in the middle of the element that a JavaScript expression finds, once there is one."""
        place = self.wait_for(
            lambda: self.ask(
                f"(() => {{ const e = {expression}; if (!e) return null; e.scrollIntoView({{block: 'center'}});"
                " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
            ),
            what,
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button=button, clickCount=1)

    def photograph(self, path: Path, colours: int = 128) -> Path:
        """A PNG of the window, in as few colours as keep it small."""
        from PIL import Image

        shot = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        image = Image.open(io.BytesIO(shot)).convert("RGB")
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        return path
