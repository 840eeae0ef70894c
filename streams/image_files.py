"""Encoded images in parquet files: found by split, decoded once, kept in a cache that is checked when opened."""

from __future__ import annotations

import hashlib
import re
import warnings
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch

from clplat.streams.cache_folder import cache_folder, made
from clplat.streams.split import Labelled

FORMAT = 1
Look = tuple[Literal["RGB", "L"], int | None]
"""How images are read: coloured or grey, and the side of the square to which they are brought (None: as they are)."""


def part_files(folder: Path, part: str) -> list[Path]:
    """The files of one split: `train.parquet`, or all of `train-0-of-3.parquet`, `train-00000-of-00003.parquet`, …"""
    whole, pieces = folder / f"{part}.parquet", sorted(folder.glob(f"{part}-*.parquet"))
    if whole.is_file() == bool(pieces):
        found = [file.name for file in pieces] or "neither"
        raise ValueError(f"root: {folder} must hold {part}.parquet or the pieces {part}-*.parquet; it holds {found}")
    counts = {int(match[1]) for file in pieces if (match := re.search(r"-of-0*(\d+)\.parquet$", file.name))}
    if counts and counts != {len(pieces)}:
        raise ValueError(f"root: {folder} holds {len(pieces)} of {max(counts)} pieces of {part}")
    return pieces or [whole]


def decoded(files: list[Path], look: Look = ("RGB", None)) -> Labelled:
    """Images (N, C, H, W) uint8, with C 1 for grey ones, and labels (N,) long of parquet files, in the files' order.

    They are decoded once and kept in $CLPLAT_CACHE (default ~/.cache/clplat), by the contents of the files.
    """
    contents = hashlib.sha256(f"images {FORMAT}{'' if look == ('RGB', None) else look}".encode())
    for file in files:
        contents.update(hashlib.sha256(file.read_bytes()).digest())
    folder = made(cache_folder())
    cache = folder / f"images-{contents.hexdigest()[:16]}.npz"
    try:
        return _opened(cache)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        warnings.warn(f"image cache {cache} is damaged ({error}) and is made again", stacklevel=2)
    images, labels = _decode(files, look)
    with TemporaryDirectory(prefix=f"{cache.name}.part-", dir=folder) as temporary:
        part = Path(temporary) / cache.name
        np.savez(part, images=images, labels=labels)
        part.replace(cache)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _opened(cache: Path) -> Labelled:
    """What the cache holds; a zip archive, so that every byte is checked against its CRC."""
    with cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])


def _decode(files: list[Path], look: Look) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet as pq

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); bring the whole file") from error
        columns = {"image", "img"} & set(table.column_names)
        if not columns or "label" not in table.column_names:
            raise ValueError(f"{file}: needs the columns image and label; it has {table.column_names}")
        encoded = table.column(min(columns)).to_pylist()
        labels.append(np.array([_class(value, file, row) for row, value in enumerate(table["label"].to_pylist())]))
        images += [_pixels(value, look, file, row) for row, value in enumerate(encoded)]
    shapes = {image.shape for image in images}
    if not images:
        raise ValueError(f"{files[0].parent}: {', '.join(file.name for file in files)} have no rows")
    if len(shapes) != 1:
        raise ValueError(f"{files[0].parent}: images must have one size, not {sorted(shapes)}")
    stacked = np.stack(images).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(stacked), np.concatenate(labels).astype(np.int64)


def _class(value: object, file: Path, row: int) -> int:
    """A label, which is a whole number."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{file}: row {row} has the label {value!r}; labels are whole numbers from 0 on")
    return value


def _pixels(value: bytes | dict[str, bytes], look: Look, file: Path, row: int) -> np.ndarray:
    """One image (H, W, C): bytes of a PNG or JPEG, or a struct that has them as `bytes`."""
    from PIL import Image, UnidentifiedImageError

    content = value["bytes"] if isinstance(value, dict) else value
    try:
        image = Image.open(BytesIO(content)).convert(look[0])
        if look[1] is not None:
            image = image.resize((look[1], look[1]), Image.Resampling.BILINEAR)  # averages over the pixels it replaces
        return np.atleast_3d(np.asarray(image))
    except (UnidentifiedImageError, OSError, TypeError) as error:
        raise ValueError(f"{file}: row {row} is not an image that can be decoded ({error})") from error
