"""Image files as the published sets have them, but small, and with pixels that tell which sample they are."""

from __future__ import annotations

import hashlib
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


def images(count: int, *shape: int, seed: int) -> np.ndarray:
    """Random pixels (count, *shape), uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(root: Path, name: str, *, train: int = 60, test: int = 20) -> dict[str, np.ndarray]:
    """The four files of MNIST or Fashion-MNIST in torchvision's layout; labels are 0 to 9 in turn."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    pixels = {"train": images(train, 28, 28, seed=1), "t10k": images(test, 28, 28, seed=2)}
    for part, values in pixels.items():
        head = np.array([0x803, len(values), 28, 28], dtype=">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + values.tobytes())
        labels = np.arange(len(values)).astype(np.uint8) % 10
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, len(values)], dtype=">i4").tobytes() + labels.tobytes()
        )
    return pixels


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_parquet(file: Path, pixels: np.ndarray, labels: np.ndarray, *, struct: bool = True) -> None:
    """Images (N, H, W, 3) as PNG, in a struct as the hub's files have them, or as plain bytes."""
    contents = [encoded(image) for image in pixels]
    column = [{"bytes": content, "path": None} for content in contents] if struct else contents
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": column, "label": pa.array(labels, pa.int64())}), file)


def cifar10_parquet(root: Path, *, train: int = 80, test: int = 40) -> dict[str, np.ndarray]:
    """A small CIFAR-10 in `root`; labels are 0 to 9 in turn."""
    pixels = {"train": images(train, 32, 32, 3, seed=3), "test": images(test, 32, 32, 3, seed=4)}
    for part, values in pixels.items():
        write_parquet(root / f"{part}.parquet", values, np.arange(len(values)) % 10)
    return pixels


def write_cifar(folder: Path, files: dict[str, int], label_key: str, classes: int) -> dict[str, str]:
    """Pickled batches of CIFAR by file name and number of images; gives the checksum of each."""
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate(files.items()):
        batch = {"data": images(count, 3072, seed=seed), label_key: [n % classes for n in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    key = "label_names" if label_key == "labels" else "fine_label_names"
    (folder / "meta").write_bytes(pickle.dumps({key: [str(n) for n in range(classes)]}))
    return {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(N, H, W) or (N, H, W, 3) as (N, C, H, W)."""
    values = torch.from_numpy(pixels)
    return values.unsqueeze(1) if values.ndim == 3 else values.permute(0, 3, 1, 2)
