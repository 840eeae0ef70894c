"""Where streams keep what they have tokenised, decoded or downloaded."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: str | None = None) -> Path:
    """The folder that is given, or $CLPLAT_CACHE, or ~/.cache/clplat."""
    return Path(given or os.environ.get("CLPLAT_CACHE") or Path.home() / ".cache" / "clplat")


def made(folder: Path) -> Path:
    """The cache folder, made where it is not there; a `ValueError` that says what to do where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be made ({error.strerror}); name one that can be written in "
            "cache_dir or the environment variable CLPLAT_CACHE"
        ) from error
    return folder
