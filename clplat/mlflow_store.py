"""Reaching MLflow's store: a quiet client, an address and an experiment, and what its errors come to."""

from __future__ import annotations

import logging
import os
import re
import textwrap
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from filelock import FileLock

from clplat.config import TrackingConfig
from clplat.databases import SQLITE, driver_package, sqlite_file
from clplat.errors import ConfigError, nearest
from clplat.mlflow_view import KIND

DATABASES = ("mssql", "mysql", "postgresql", "sqlite")
SERVERS = ("databricks", "databricks-uc", "http", "https", "uc")
"""Schemes of tracking URIs that MLflow knows by itself."""


def quiet_mlflow() -> None:
    """Before MLflow is imported: no telemetry, no bars, and seconds rather than minutes for a dead server."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


def client(uri: str) -> Any:
    """An MLflow client that is quiet, sends no telemetry, and gives up on a dead server within seconds."""
    quiet_mlflow()
    import mlflow

    # What the store raises is caught and said once; its own log would say it, with the traceback, at every attempt.
    for name, level in {"mlflow": "ERROR", "alembic": "ERROR", "mlflow.store.db.utils": "CRITICAL"}.items():
        logging.getLogger(name).setLevel(level)
    mlflow.set_tracking_uri(uri)
    path = sqlite_file(uri)
    if path is not None:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    # One process at a time makes the tables of a new file: MLflow 3.17 fails where two do, `table already exists`.
    alone = path is not None and os.access(path.absolute().parent, os.W_OK)
    with FileLock(f"{path}.lock") if alone else nullcontext():
        return mlflow.MlflowClient(uri)


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that no MLflow of this machine could ever reach; whether a server answers is not asked."""
    scheme = uri.partition(":")[0] if ":" in uri else ""
    engine, known = scheme.partition("+")[0], {*DATABASES, *SERVERS, *_plugins()}
    if engine in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("1", "true"):
        raise ConfigError(
            f"tracking.uri: {uri} is a folder, which MLflow no longer writes to; name a database (sqlite:///mlflow.db) "
            "or a server (http://…)"
        )
    if engine not in known | {"", "file"}:
        raise ConfigError(f"tracking.uri: {uri}: MLflow knows no {scheme!r}{nearest(engine, known)}")
    if engine in DATABASES:
        from sqlalchemy import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            make_url(uri).get_dialect().import_dbapi()
        except (SQLAlchemyError, ValueError) as error:
            raise ConfigError(f"tracking.uri: {uri} is no database's address ({short(error)})") from error
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracking.uri: {engine} needs its driver, which is not installed: pip install {driver_package(error)}"
            ) from error


def _plugins() -> list[str]:
    """Schemes that installed packages bring to MLflow."""
    return [entry.name for entry in entry_points(group="mlflow.tracking_store")]


def absolute(uri: str) -> str:
    """The URI with a relative SQLite file made absolute, so that it means the same from any folder."""
    if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}/"):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def experiment_id(connection: Any, tracking: TrackingConfig) -> str:
    """The experiment, made if it is new; a local database keeps its artifacts in a folder beside it."""
    found = connection.get_experiment_by_name(tracking.experiment)
    if found is not None:
        return found.experiment_id
    path, place = sqlite_file(absolute(tracking.uri)), None
    if path is not None:
        place = (path.parent / "mlartifacts" / tracking.experiment).as_uri()
    try:
        return connection.create_experiment(tracking.experiment, artifact_location=place, tags=KIND)
    except Exception:
        # Another process made it in the meantime.
        found = connection.get_experiment_by_name(tracking.experiment)
        if found is None:
            raise
        return found.experiment_id


def short(error: Exception) -> str:
    """An error on one line, cut to what fits into another message; of a dead connection only what the system said."""
    text = re.sub(r" ?\(Background on this error at: \S+\)", "", " ".join(str(error).split()))
    system = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(timed out)", text)
    if system:
        return next(filter(None, system.groups())).lower()
    return textwrap.shorten(text, 200, placeholder=" …") or type(error).__name__
