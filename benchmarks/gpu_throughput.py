"""What the platform costs on a GPU: training speed beside a bare compiled loop over the same data, model and step.

    python benchmarks/gpu_throughput.py text --data FILE.jsonl     # 55M Transformer, bf16, rows of 1024 tokens
    python benchmarks/gpu_throughput.py images --data FOLDER       # Split CIFAR-10 (parquet) with ResNet-18, bf16
    … --mode reduce-overhead                                       # both sides replay CUDA graphs

Both sides compile forward pass and loss, use the same optimizer and clip the gradient alike. Repetitions alternate;
ratios are medians of the ratio within one. Of images, the peer trains on one batch that never leaves the device, and
the best DataLoader of {0, 4, 8, 16} workers with torchvision's transforms on the CPU stands beside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.assembly import built_architecture
from clplat.config import RunConfig, save
from clplat.fitting import fit, task_loader
from clplat.interruption import Interruption
from clplat.journal import Journal
from clplat.loop import Run
from clplat.progress import Silent
from clplat.streams.batch import Batch
from clplat.study_file import expand, load_study

TRAINING = {
    "precision": "bf16-mixed", "clip_norm": 1.0, "threads": 8,
    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 3e-4, "fused": True}},
}  # fmt: skip


def text(options: argparse.Namespace) -> RunConfig:
    """A 55M Transformer of few, wide layers, which compiles in half a minute, on rows of 1024 tokens."""
    stream = {
        "tokenizer": {"class_path": "clplat.streams.tokenizers.BPETokenizer", "init_args": {"vocab_size": 4096}},
        "block_size": options.length,
        "max_eval_tokens": options.length,
        "domains": [{"name": "text", "path": "json", "data_files": {"train": options.data}}],
    }
    model = {"hidden_size": options.width, "num_layers": options.layers, "num_heads": options.width // 64}
    model["document_mask"] = options.document_mask
    return _config(options, {"class_path": "TextStream", "init_args": stream}, "Transformer", model)


def images(options: argparse.Namespace) -> RunConfig:
    """ResNet-18 on the first task of Split CIFAR-10, with crops and flips."""
    stream = {"source": "parquet", "root": options.data, "num_tasks": 1}
    return _config(options, {"class_path": "SplitCIFAR10", "init_args": stream}, "ResNet18", {})


def _config(options: argparse.Namespace, stream: Any, name: str, model: Any) -> RunConfig:
    study = {
        "name": "throughput", "stream": stream, "architecture": {"class_path": name, "init_args": model},
        "training": TRAINING | {
            "batch_size": options.batch, "budget": {"steps": options.steps}, "compile": options.mode or True,
        },
        "tracking": {"enabled": False},
    }  # fmt: skip
    return expand(load_study(study))[0]


class Bare:
    """The loop that one would write oneself: compiled forward pass and loss, backward, clip, step."""

    def __init__(self, run: Run, mode: str | None) -> None:
        architecture = built_architecture(run.config, run.parts.stream).to("cuda").train()
        self.weights = list(architecture.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=3e-4, fused=True)

        def loss(batch: Batch) -> Tensor:
            logits, targets = architecture(batch).logits, batch.targets
            return F.cross_entropy(logits.flatten(0, targets.ndim - 1), targets.flatten(), ignore_index=-100)

        self.loss = torch.compile(loss, mode=mode)

    def __call__(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = self.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work with the device's queue empty at both ends."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def rows_of(run: Run) -> Iterable[Batch]:
    """The batches of one task, as the platform's loader gives them."""
    run.parts.learner.batches = 0
    return task_loader(run, run.path[0])


def platform(run: Run) -> None:
    """One task of a run as users have it."""
    run.parts.learner.batches = 0
    fit(run, run.path[0])


def loaded(run: Run, workers: int) -> Iterator[Batch]:
    """Batches as torchvision users make them: one image at a time, transformed on the CPU."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    data = run.path[0].train
    pixels, labels = data.inputs, data.targets
    change = v2.Compose([
        v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ])  # fmt: skip

    class Images(Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return change(pixels[index]), labels[index]

    size = run.config.training.batch_size
    loader = DataLoader(Images(), size, shuffle=True, num_workers=workers, pin_memory=True, drop_last=True)
    task = torch.zeros(size, dtype=torch.long, device="cuda")
    steps = 0
    while True:
        for inputs, targets in loader:
            if steps == run.config.training.budget.steps:
                return
            steps += 1
            yield Batch(inputs=inputs.to("cuda", non_blocking=True), targets=targets.to("cuda", non_blocking=True),
                        task=task)  # fmt: skip


def measure(run: Run, peers: dict[str, Callable[[], object]], repetitions: int, unit: str, per_step: int) -> None:
    """Rates of all, and ratios to the first."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for repetition in range(repetitions + 1):
        for name, work in peers.items():
            spent = seconds(work)
            if repetition:
                found[name].append(spent)
    total, (reference, *_) = per_step * run.config.training.budget.steps, found
    for name, spent in found.items():
        ratio = statistics.median(a / b for a, b in zip(found[reference], spent, strict=True))
        rates = sorted(total / one for one in spent)
        print(f"  {name:36} {statistics.median(rates):12,.0f} {unit}/s ({rates[0]:,.0f} to {rates[-1]:,.0f})"
              f"  {ratio:.3f} × {reference}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "images"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, help="default: 60 of text, 400 of images, some two passes over CIFAR-10")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mode", choices=["reduce-overhead"], help="of torch.compile, on both sides; else its default")
    parser.add_argument("--document-mask", action="store_true")
    parser.add_argument("--loaders", type=int, nargs="*", default=[0, 4, 8, 16])
    options = parser.parse_args()
    options.batch = options.batch or (32 if options.what == "text" else 256)
    options.steps = options.steps or (60 if options.what == "text" else 400)
    config = (text if options.what == "text" else images)(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(config, folder / "config.yaml")
        run = Run(config, folder, journal=Journal(folder), interruption=Interruption(), progress=Silent())
        run.parts.context.task = run.path[0]
        report(run, options)


def report(run: Run, options: argparse.Namespace) -> None:
    weights = sum(p.numel() for p in run.parts.architecture.parameters())
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {weights / 1e6:.1f}M weights, "
        f"batch {options.batch}, {options.steps} steps, {options.repetitions} repetitions, "
        f"torch.compile mode {options.mode or 'default'}",
        flush=True,
    )
    bare, ours = Bare(run, options.mode), lambda: platform(run)
    if options.what == "text":
        peers = {"bare compiled loop": lambda: bare(rows_of(run)), "clplat": ours}
        measure(run, peers, options.repetitions, "tokens", options.batch * options.length)
        return
    constant = run.path[0].train.batch(torch.arange(options.batch)).to("cuda")
    peers = {"compiled step, constant batch": lambda: bare([constant] * options.steps), "clplat": ours}
    measure(run, peers, options.repetitions, "images", options.batch)
    for workers in options.loaders:
        _one_loader(run, bare, workers, options.batch)


def _one_loader(run: Run, bare: Bare, workers: int, batch: int) -> None:
    """The rate of one DataLoader from its tenth batch on, when all workers are up; a fifth of the steps."""
    batches, count = loaded(run, workers), max(20, run.config.training.budget.steps // 5)
    bare(islice(batches, 10))
    spent = seconds(lambda: bare(islice(batches, count)))
    print(f"  DataLoader, {workers:2} workers {batch * count / spent:30,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
