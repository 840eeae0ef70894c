"""State files, and a full disk: said as what a person can do about it, with room kept for the last words of a run."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clplat.errors import StorageError

RESERVED = 16_384
"""Bytes that a run keeps for its status: a few blocks of any file system."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room, no room for this user, no room in a file."""


def full_disk(folder: Path, error: OSError, remedy: str = "") -> StorageError:
    """The error with how to go on: `remedy`, or to resume the folder."""
    remedy = remedy or f"`clplat resume {folder}` goes on; what has finished is safe"
    return StorageError(f"{folder}: cannot be written ({error.strerror or error}). Free some space, then {remedy}.")


@contextmanager
def writing(folder: Path, remedy: str = "") -> Iterator[None]:
    """Errors of the disk inside become a `StorageError` that says how to go on."""
    try:
        yield
    except OSError as error:
        raise full_disk(folder, error, remedy) from error


class Reserve:
    """A file in a run folder whose room is given back when the status could not be written for want of any."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "reserve"
        with contextlib.suppress(OSError):
            self._path.write_bytes(bytes(RESERVED))

    def release(self) -> None:
        """Take the file away; there is nothing to do where it could not be made."""
        self._path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a small state file; None when it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a small state file, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)
