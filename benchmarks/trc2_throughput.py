"""Training speed of TRC² with and without its loops beside its mixture-of-experts rival, on a GPU in bf16.

    python benchmarks/trc2_throughput.py                       # 768 wide, 4 columns, rows of 1024 tokens
    python benchmarks/trc2_throughput.py --width 512 --layers 10
    python benchmarks/trc2_throughput.py --toy                 # the script itself, on a CPU, in a minute

All arms run as users run them, through the platform, compiled, on the embedded text. The rival's experts are made as
wide as it takes to have the active parameters of TRC² without loops; with loops TRC² has a few more. Repetitions
alternate, and ratios are medians of the ratio within one. Replay is shown apart: rates count current tokens alone, so
what its arm falls behind "TRC²" is what the replayed rows and their bookkeeping take.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_throughput import TRAINING, measure, platform

from clplat.architectures.base import Architecture
from clplat.architectures.moe_transformer import MoETransformer
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions, ThalamusOptions
from clplat.config import RunConfig, save
from clplat.interruption import Interruption
from clplat.journal import Journal
from clplat.loop import Run
from clplat.progress import Silent
from clplat.streams.base import Spec
from clplat.study_file import expand, load_study

NO_LOOPS = {"thalamus": {"enabled": False}, "hippocampus": {"read": False}}
REPLAY = {"class_path": "ExperienceReplay", "init_args": {"capacity": 256, "ratio": 0.125, "from_task": 1}}


def active(model: type[Architecture], spec: Spec, **options: Any) -> int:
    """Active parameters of a model that is not built."""
    with torch.device("meta"):
        return model(spec=spec, **options).active_parameters()


def rival_inner_size(width: int, layers: int, heads: int, length: int) -> int:
    """Width of the rival's experts, a multiple of 8, at which its active parameters come closest to TRC²'s own."""
    spec = Spec(kind="language", input_shape=(length,), num_outputs=256)
    own = active(
        TRC2, spec, hidden_size=width, num_layers=layers, column=ColumnOptions(num_heads=heads),
        thalamus=ThalamusOptions(enabled=False), hippocampus=HippocampusOptions(read=False),
    )  # fmt: skip
    sizes = {"hidden_size": width, "num_layers": layers, "num_heads": heads}
    least, more = (active(MoETransformer, spec, inner_size=inner, **sizes) for inner in (8, 16))
    return 8 * max(1, 1 + round((own - least) / (more - least)))


def arms(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By name what makes each arm: architecture and strategies."""
    width, layers, heads = options.width, options.layers, max(4, options.width // 64)
    sizes = {"hidden_size": width, "num_layers": layers}
    rival = {**sizes, "num_heads": heads, "inner_size": rival_inner_size(width, layers, heads, options.length)}
    own = {**sizes, "dropout": 0.0, "column": {"num_heads": heads}}
    whole = {"class_path": "TRC2", "init_args": own}
    return {
        "MoETransformer": {"architecture": {"class_path": "MoETransformer", "init_args": rival}},
        "TRC² without loops": {"architecture": {"class_path": "TRC2", "init_args": own | NO_LOOPS}},
        "TRC²": {"architecture": whole},
        "TRC² with replay": {"architecture": whole, "strategies": {"replay": REPLAY}},
    }


def configured(arm: dict[str, Any], options: argparse.Namespace) -> RunConfig:
    stream = {"block_size": options.length, "max_train_tokens": 4_000_000, "max_eval_tokens": options.length}
    training = TRAINING | {
        "batch_size": options.batch, "budget": {"steps": options.steps}, "compile": options.mode or True,
    }  # fmt: skip
    if options.toy:
        training |= {"precision": "32-true", "threads": 1, "compile": False}
        training["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 3e-4}}
    study = {
        "name": "throughput", "stream": {"class_path": "StdlibText", "init_args": stream}, "training": training,
        "tracking": {"enabled": False}, **arm,
    }  # fmt: skip
    return expand(load_study(study))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--mode", choices=["reduce-overhead"], help="of torch.compile; else its default")
    parser.add_argument("--toy", action="store_true", help="tiny models, not compiled, on a CPU")
    options = parser.parse_args()
    if options.toy:
        options.width, options.layers, options.length, options.batch, options.steps = 64, 2, 64, 4, 3
        options.repetitions = 2
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: started(configured(arm, options), Path(scratch) / str(number))
                for number, (name, arm) in enumerate(arms(options).items())}  # fmt: skip
        report(runs, options)


def started(config: RunConfig, folder: Path) -> Run:
    """A run before its first task."""
    folder.mkdir()
    save(config, folder / "config.yaml")
    run = Run(config, folder, journal=Journal(folder), interruption=Interruption(), progress=Silent())
    run.parts.context.task = run.path[0]
    return run


def report(runs: dict[str, Run], options: argparse.Namespace) -> None:
    card = "CPU" if options.toy else torch.cuda.get_device_name()
    print(
        f"{card}, torch {torch.__version__}; {options.width} wide, {options.layers} layers, batch {options.batch} × "
        f"{options.length}, {options.steps} steps, {options.repetitions} repetitions",
        flush=True,
    )
    for name, run in runs.items():
        model = run.parts.architecture
        total = sum(p.numel() for p in model.parameters())
        print(f"  {name:20} {total / 1e6:8.2f}M parameters, {model.active_parameters() / 1e6:.2f}M active", flush=True)
    peers = {name: lambda run=run: platform(run) for name, run in runs.items()}
    measure(next(iter(runs.values())), peers, options.repetitions, "tokens", options.batch * options.length)


if __name__ == "__main__":
    main()
