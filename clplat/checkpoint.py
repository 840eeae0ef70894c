"""Checkpoints: written under another name and renamed, checked by their hash, the last two kept.

A file's name carries the SHA-256 of its content, so a truncated or damaged one is told from a good one
before anything is read from it. Tensors and plain data only; loading executes nothing (`weights_only`).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from clplat.errors import StorageError

_NAME = re.compile(r"(\d{8})-(\w+)-([0-9a-f]{16})\.pt")
KEPT = 2


class Checkpoints:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, *, every_seconds: float) -> None:
        self.folder, self.every_seconds = folder / "checkpoints", every_seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saved = time.monotonic()
        self._number = max((int(match[1]) for _, match in self._files()), default=0)
        for leftover in self.folder.glob("*.part"):
            leftover.unlink()

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved >= self.every_seconds

    def save(self, state: dict[str, Any], label: str) -> Path:
        """Write a checkpoint; older ones beyond the last two go once it is safely there."""
        self._number += 1
        path = write(state, self.folder / f"{self._number:08d}-{label}")
        self._saved = time.monotonic()
        for old, _ in self._files()[:-KEPT]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None when there is none; damaged ones are skipped with a warning.

        Raises `StorageError` when all are damaged: to begin again is for a person to decide.
        """
        damaged: list[Path] = []
        for path, match in reversed(self._files()):
            if file_hash(path) == match[3]:
                for bad in damaged:
                    warnings.warn(f"{bad}: damaged or cut short; going back to {path.name}", stacklevel=2)
                    bad.unlink()
                return torch.load(path, map_location="cpu", weights_only=True)
            damaged.append(path)
        if damaged:
            names = ", ".join(path.name for path in damaged)
            raise StorageError(
                f"{self.folder}: every checkpoint is damaged or cut short ({names}). "
                "Put good copies back, or remove this folder and resume: the run then begins again."
            )
        return None

    def _files(self) -> list[tuple[Path, re.Match[str]]]:
        named = ((path, _NAME.fullmatch(path.name)) for path in sorted(self.folder.glob("*.pt")))
        return [(path, match) for path, match in named if match]


def write(state: dict[str, Any], stem: Path) -> Path:
    """Write `state` to STEM-<hash>.pt, atomically; raises `StorageError` when there is no room."""
    part = stem.with_name(stem.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = stem.with_name(f"{stem.name}-{file_hash(part)}.pt")
        part.replace(path)
    except (OSError, RuntimeError) as error:
        # torch reports a short write as RuntimeError ("unexpected pos"); the half-written file must not stay.
        part.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else "it was cut short, as by a full disk"
        raise StorageError(
            f"{stem.parent}: the checkpoint could not be written ({why}). Free some space or change `folder`, "
            f"then continue with `clplat resume {stem.parents[1]}`; the checkpoint before is untouched."
        ) from error
    return path


def file_hash(path: Path) -> str:
    """16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
