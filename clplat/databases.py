"""Addresses of databases: the file that one names, and the package that a driver comes in."""

from __future__ import annotations

from pathlib import Path

from clplat.errors import ConfigError

SQLITE = "sqlite:///"
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""By the module that is missing: the package that brings it, where it has another name."""


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address, options behind `?` left out; None for any other address."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def refuse_missing(uri: str) -> None:
    """ConfigError for a SQLite file that is not there: who opens it makes it, and shows an empty place."""
    path = sqlite_file(uri)
    if path is not None and not path.is_file():
        raise ConfigError(f"there is no database {path}; go to the study, or name its database with --uri")


def driver_package(error: ImportError) -> str:
    """What to hand to `pip install` for a driver that could not be imported."""
    return DRIVERS.get(error.name or "", error.name or "")
