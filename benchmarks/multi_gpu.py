"""One run on two GPUs beside one: tokens a second at an equal batch a GPU, held-out losses at an equal batch in all.

    python benchmarks/multi_gpu.py                             # 64M Transformer and TRC² (54M active), bf16, 2 GPUs
    python benchmarks/multi_gpu.py --compile --seconds 300     # both sides compiled
    python benchmarks/multi_gpu.py --parts losses --models trc2 --seeds 0 1 2 3 4
    python benchmarks/multi_gpu.py --sharding fsdp --models transformer
    python benchmarks/multi_gpu.py --parts speed --apart --profile   # and what keeps two from being twice one
    python benchmarks/multi_gpu.py --device cpu                # the script itself, tiny, with two CPU processes

Every arm is a `clplat.run` of its own on the embedded text in rows of 1024 tokens, so nothing is downloaded and what
users have is what is timed. `speed`: each device takes --batch rows a step; rates are medians over the steps after the
first --skip, which make the plans (compilation, gradient buckets), of the time between two optimizer steps on the
device itself, and of a group the slowest process counts. --apart times as many runs of one device each, side by side:
what the machine gives without any exchange. --profile records a group's last five steps: how long its first device
computes, exchanges without computing, and waits. `losses`: --batch rows a step in all, on one device and on
several, for each seed; what the devices change stands beside what seeds change. An arm that fails or takes longer than
--seconds is said to have done so, and the others go on, until --total seconds are over.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from clplat.architectures.base import StepOutcome
from clplat.journal import table
from clplat.strategies.base import Strategy
from clplat.streams.base import Task

RUN = "import sys, clplat; sys.exit(clplat.run(sys.argv[1], quiet=True).code)"
MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"class_path": "Transformer", "init_args": {"hidden_size": 1024, "num_layers": 5, "num_heads": 16}},
    "trc2": {"class_path": "TRC2", "init_args": {"hidden_size": 768, "num_layers": 3, "dropout": 0.0}},
}
TOYS: dict[str, dict[str, Any]] = {
    "transformer": {"class_path": "Transformer", "init_args": {"hidden_size": 64, "num_layers": 2}},
    "trc2": {
        "class_path": "TRC2",
        "init_args": {"hidden_size": 64, "num_layers": 2, "dropout": 0.0, "column": {"num_heads": 4}},
    },
}


PROFILED = 5
"""Steps at the end of a run that are profiled, and not timed."""
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""What torch's profiler calls the kinds of a device's own events."""


class StepClock(Strategy):
    """Writes down when each optimizer step was done on this process's device, and what memory that took; with
    `profile_from` also what the device does from that step on."""

    shards = True

    def __init__(self, *, folder: str, profile_from: int | None = None) -> None:
        self.folder, self.stamps, self.profile_from = Path(folder), [], profile_from

    def step_end(self, outcome: StepOutcome) -> None:
        if self.profile_from is not None and outcome.step >= self.profile_from:
            if outcome.step == self.profile_from:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # the host is several steps ahead, whose kernels are no profiled step's
                self.profiler = torch.profiler.profile()
                self.profiler.start()
            return
        if torch.cuda.is_available() and self.context.device().type == "cuda":
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
            self.stamps.append(stamp)
        else:
            self.stamps.append(time.perf_counter())

    def task_end(self, task: Task) -> None:
        pairs = list(zip(self.stamps, self.stamps[1:]))
        on_gpu = self.context.device().type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        model = self.context.architecture
        found = {
            "seconds": [one.elapsed_time(two) / 1e3 if on_gpu else two - one for one, two in pairs],
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            "parameters": sum(p.numel() for p in model.parameters()),
            "active": model.active_parameters(),
        }
        if self.profile_from is not None:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.folder / f"trace-{self.context.world.rank}.json"))
        (self.folder / f"{self.context.world.rank}.json").write_text(json.dumps(found))


def parts_of_time(trace: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a trace in which the device computes, exchanges (in all, and while it computes nothing) and does
    neither, and the number of exchanges."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = [(e["ts"], e["ts"] + e["dur"], "nccl" in e["name"]) for e in events if e.get("cat") in ON_DEVICE]
    computing = covered([(start, stop) for start, stop, exchange in spans if not exchange])
    either = covered([(start, stop) for start, stop, _ in spans])
    whole = max(stop for _, stop, _ in spans) - min(start for start, _, _ in spans) if spans else 0.0
    return {
        "computes": computing / 1e3,
        "exchanges": covered([(start, stop) for start, stop, exchange in spans if exchange]) / 1e3,
        "exchanges_alone": (either - computing) / 1e3,
        "waits": (whole - either) / 1e3,
        "count": sum(event["name"].startswith(("nccl:", "gloo:")) for event in events),
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of what at least one span covers."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def study(model: str, devices: int, rows: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A study of `rows` rows a step over all devices."""
    toy, length = options.device == "cpu", options.length
    stream = {"block_size": length, "max_train_tokens": 4_000_000, "max_eval_tokens": options.held_out * length}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 3e-4} | ({} if toy else {"fused": True})}
    return {
        "name": model, "folder": str(scratch), "tasks": 1,
        "stream": {"class_path": "StdlibText", "init_args": stream | {"max_answers": 0}},
        "architecture": (TOYS if toy else MODELS)[model],
        "strategies": {"clock": {"class_path": "multi_gpu.StepClock", "init_args": {"folder": str(scratch)}}},
        "training": {
            "budget": {"steps": options.steps}, "batch_size": rows, "clip_norm": 1.0, "optimizer": optimizer,
            "precision": "32-true" if toy else "bf16-mixed", "threads": 1 if toy else 4, "compile": options.compile,
            "accelerator": "cpu" if toy else "gpu", "devices": devices,
            "sharding": options.sharding if devices > 1 else "none",
        },
        "evaluation": {"batch_size": options.batch},
        "checkpoint": {"every_seconds": 1e9},
        "tracking": {"enabled": False},
    }  # fmt: skip


def carried_out(config: dict[str, Any], scratch: Path, limit: float, environment: dict[str, str] | None = None) -> None:
    """A study, without its report, in processes of its own; raises RuntimeError when it fails or takes too long."""
    (scratch / "study.yaml").write_text(yaml.safe_dump(config))
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with (scratch / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(scratch / "study.yaml")],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": search} | (environment or {}),
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"none after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes too
                process.wait()
    if code:
        errors = [path.read_text() for path in scratch.glob("*/*/error.txt")]
        said = (scratch / "output.txt").read_text() + "".join(errors)
        raise RuntimeError(f"exit code {code}; it said last:\n{said[-2500:]}")


def speed(model: str, options: argparse.Namespace) -> None:
    """Rates and memory on one device and on several, each with as many rows a step."""
    rates: dict[int, float] = {}
    if options.apart:
        apart(model, options)
    for devices in (1, options.devices):
        start, profiled = time.perf_counter(), options.profile and devices > 1
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            config = study(model, devices, devices * options.batch, options, scratch)
            if profiled:
                config["strategies"]["clock"]["init_args"]["profile_from"] = options.steps - PROFILED
            carried_out(config | {"seeds": options.seeds[:1]}, scratch, left(options))
            found = [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(devices)]
            parts = parts_of_time(json.loads((scratch / "trace-0.json").read_text())) if profiled else {}
        steady = [one["seconds"][options.skip :] for one in found]
        slowest = max(statistics.median(each) for each in steady)
        rates[devices] = devices * options.batch * options.length / slowest
        quarter = statistics.quantiles(steady[0], n=4)
        peak = max(one["peak_bytes"] for one in found) / 2**30
        say(f"  {model:11} {found[0]['parameters'] / 1e6:6.1f}M parameters, {found[0]['active'] / 1e6:.1f}M active; "
            f"{devices} × {options.batch} × {options.length}: {rates[devices]:11,.0f} tokens/s, step "
            f"{1e3 * slowest:.1f} ms (quartiles {1e3 * quarter[0]:.1f} to {1e3 * quarter[2]:.1f}, "
            f"n = {len(steady[0])}), peak {peak:.1f} GiB a device [{time.perf_counter() - start:.0f} s]")  # fmt: skip
        if parts:
            a_step = {name: value / PROFILED for name, value in parts.items()}
            say(f"  {model:11} a profiled step: computes {a_step['computes']:.1f} ms, exchanges "
                f"{a_step['exchanges']:.1f} ms in {a_step['count']:.0f} calls, {a_step['exchanges_alone']:.1f} of them "
                f"without computing, waits {a_step['waits']:.1f} ms")  # fmt: skip
    say(f"  {model:11} ratio {rates[options.devices] / rates[1]:.3f} on {options.devices} devices")


def apart(model: str, options: argparse.Namespace) -> None:
    """Steps of one device each, of as many runs at the same time as a group has devices."""
    medians = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.devices) as pool:
        runs = []
        for device in range(options.devices):
            scratch = Path(folder) / str(device)
            scratch.mkdir()
            config = study(model, 1, options.batch, options, scratch) | {"seeds": options.seeds[:1]}
            runs.append(pool.submit(carried_out, config, scratch, left(options), {"CUDA_VISIBLE_DEVICES": str(device)}))
        for device, run in enumerate(runs):
            run.result()
            found = json.loads((Path(folder) / str(device) / "0.json").read_text())
            medians.append(statistics.median(found["seconds"][options.skip :]))
    steps = ", ".join(f"{1e3 * median:.1f}" for median in medians)
    say(f"  {model:11} {options.devices} runs apart, each {options.batch} × {options.length}: steps of {steps} ms")


def losses(model: str, options: argparse.Namespace) -> None:
    """Final held-out losses of all seeds on one device and on several, with as many rows a step in all."""
    found: dict[int, list[float]] = {}
    for devices in (1, options.devices):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            config = study(model, devices, options.batch, options, scratch)
            carried_out(config | {"seeds": options.seeds}, scratch, left(options))
            runs = [next(scratch.glob(f"*/*-s{seed}")) for seed in options.seeds]
            found[devices] = [float(table(run).matrix("loss")[1, 0]) for run in runs]
        said = ", ".join(f"{loss:.5f}" for loss in found[devices])
        spent = time.perf_counter() - start
        say(f"  {model:11} {devices} device(s), seeds {options.seeds}: {said} nats [{spent:.0f} s]")
    differences = [two - one for one, two in zip(found[1], found[options.devices], strict=True)]
    spread = statistics.stdev(found[1]) if len(options.seeds) > 1 else float("nan")
    say(f"  {model:11} difference by seed: {', '.join(f'{each:+.5f}' for each in differences)}; "
        f"mean {statistics.mean(differences):+.5f}, standard deviation over seeds {spread:.5f}")  # fmt: skip


def left(options: argparse.Namespace) -> float:
    """Seconds that the next arm may take; raises RuntimeError when none are left."""
    rest = options.end - time.perf_counter()
    if rest <= 0:
        raise RuntimeError(f"not begun: the {options.total:.0f} s of --total are over")
    return min(options.seconds, rest)


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--devices", type=int, default=2, help="processes, or GPUs, of the larger arm")
    parser.add_argument("--parts", nargs="+", choices=["speed", "losses"], default=["speed", "losses"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--compile", action="store_true", help="torch.compile; takes a minute or two an arm")
    parser.add_argument("--apart", action="store_true", help="time runs of one device each, at the same time, too")
    parser.add_argument("--profile", action="store_true", help="say what the first device of a group does")
    parser.add_argument("--sharding", choices=["none", "fsdp"], default="none", help="of the larger arm's weights")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--batch", type=int, default=32, help="rows a step: of each device (speed), of all (losses)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=10, help="first steps that are not timed")
    parser.add_argument("--held-out", type=int, default=64, help="rows that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="most time that one arm may take")
    parser.add_argument("--total", type=float, default=150.0, help="most time that all arms may take together")
    options = parser.parse_args()
    options.end = time.perf_counter() + options.total
    if options.device == "cpu":
        options.length, options.batch, options.steps, options.skip, options.held_out = 64, 4, 6, 2, 4
        options.steps += PROFILED if options.profile else 0
    card = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    say(f"{card}, torch {torch.__version__}, {'compiled' if options.compile else 'eager'}, {options.steps} steps")
    for part in options.parts:
        say(f"{part}:")
        for model in options.models:
            try:
                {"speed": speed, "losses": losses}[part](model, options)
            except (RuntimeError, OSError) as error:
                say(f"  {model:11} FAILED: {error}")


if __name__ == "__main__":
    main()
