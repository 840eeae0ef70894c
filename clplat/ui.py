"""MLflow's pages on this machine, with the addresses of the studies that they hold."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from clplat.databases import refuse_missing
from clplat.errors import ConfigError
from clplat.mlflow_view import page_of_study

SHOWN = 5
"""Studies whose addresses are printed, the newest."""


def serve(uri: str, port: int) -> int:
    """Start MLflow's server, say where the newest studies are once it answers, stay until it ends; its exit code."""
    refuse_missing(uri)
    check_port(port, uri)
    command = [sys.executable, "-P", "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    # One process serves one person, and starts in a third of the time of four. Nothing is told to anybody.
    command += ["--workers", "1", "--backend-store-uri", uri]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # A session of its own, so that all of its processes can be ended together.
    server = subprocess.Popen(command, env=quiet | os.environ, start_new_session=True)
    try:
        base = f"http://127.0.0.1:{port}/"
        while server.poll() is None and not _answers(base):
            time.sleep(0.3)
        if server.poll() is None:
            for line in addresses(base):
                print(line, flush=True)
        return server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def check_port(port: int, uri: str) -> None:
    """Refuse a port that somebody listens on: what answers there would be taken for the server that is started."""
    with socket.socket() as asked, socket.socket() as other:
        # As servers do, so that a port is not refused for connections of before that the system has not forgotten yet.
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            other.bind(("127.0.0.1", 0))
            free = other.getsockname()[1]
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "is in use, perhaps by a server that was started before" if in_use else f"cannot be had ({error})"
            command = f"clplat ui --uri {uri} --port {free}"
            raise ConfigError(f"--port: {port} {why}; `{command}` takes one that is free") from error


def _answers(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}health", timeout=5):
            return True
    except OSError:
        return False


def addresses(base: str) -> Iterator[str]:
    """Lines that say where the newest studies are, as the server at `base` holds them."""
    found = _asked(base, "experiments/search", {"max_results": 1000}).get("experiments", [])
    ids = [experiment["experiment_id"] for experiment in found]
    wanted = {
        "experiment_ids": ids, "filter": "tags.kind = 'study'", "max_results": SHOWN,
        "order_by": ["attributes.start_time DESC"],
    }  # fmt: skip
    studies = _asked(base, "runs/search", wanted).get("runs", [])
    yield f"MLflow: {base}" if studies else f"MLflow: {base} (no studies in it yet)"
    for study in studies:
        name = study["info"]["run_name"]
        yield f"  {name}: {base}{page_of_study(study['info']['experiment_id'], name)}"


def _asked(base: str, what: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{base}api/2.0/mlflow/{what}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
