"""What a replay buffer takes of each process's memory and time, where one, two, … processes share it.

    python benchmarks/shared_buffers.py                       # 20,000 rows of 3 × 32 × 32 float32, 246 MB, on the CPU
    python benchmarks/shared_buffers.py --device gpu --sizes 1 2
    python benchmarks/shared_buffers.py --policy ring_reservoir --rows 64

A step adds --rows rows and draws as many, over all processes together. Printed are the bytes of the rows that a process
holds, by how much its memory has grown since before the first row (resident pages; on a GPU what is allocated), and the
median time of a step of the slowest process, once the buffer is full.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from clplat.strategies.buffers import Buffer
from clplat.strategies.ring_reservoir import RingReservoir
from clplat.strategies.world import World
from clplat.streams.batch import Batch


def memory(device: torch.device) -> int:
    """Bytes that this process takes now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def measured(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, float]:
    """A buffer filled and used, as this process sees it."""
    generator = torch.Generator().manual_seed(0)
    if options.policy == "ring_reservoir":
        buffer: Buffer = RingReservoir(capacity=options.capacity, ring_share=0.2, generator=generator, world=world)
    else:
        buffer = Buffer(capacity=options.capacity, policy=options.policy, generator=generator, world=world)
    own = options.rows // world.size
    batch = Batch(inputs=torch.ones(own, 3, 32, 32, device=device), targets=torch.arange(own, device=device) % 10)
    before, seconds = memory(device), []
    for step in range(options.capacity // options.rows + 1 + options.steps):
        start = time.perf_counter()
        buffer.add(batch, stamp=(step, 0))
        buffer.draw(own)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    held = sum(store.nbytes for store in buffer.rows.values())
    grown, step_ms = memory(device) - before, 1e3 * statistics.median(seconds[-options.steps :])
    return {"held": held, "grown": grown, "ms": step_ms, "all": buffer.nbytes}


def process(rank: int, size: int, folder: Path, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    gpu, device = options.device == "gpu", torch.device("cpu")
    if gpu:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=meeting, rank=rank, world_size=size)
    (folder / f"{rank}.json").write_text(json.dumps(measured(options, World.current(), device)))
    dist.barrier()  # one that leaves early can make the other fail at its end
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--capacity", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=32, help="rows a step of all processes together")
    parser.add_argument("--steps", type=int, default=200, help="steps with a full buffer, which are timed")
    choices = ["reservoir", "ring", "class_balanced", "ring_reservoir"]
    parser.add_argument("--policy", choices=choices, default="reservoir")
    parser.add_argument("--as-rank", nargs=3, metavar=("RANK", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank, size, folder = options.as_rank
        process(int(rank), int(size), Path(folder), options)
    for size in () if options.as_rank else options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            again = [sys.executable, __file__, *sys.argv[1:]]
            running = [subprocess.Popen([*again, "--as-rank", str(r), str(size), folder]) for r in range(size)]
            if any([one.wait() for one in running]):
                sys.exit("a process failed")
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
        held, grown = (", ".join(f"{one[key] / 1e6:.1f}" for one in found) for key in ("held", "grown"))
        print(f"{size} process(es): {found[0]['all'] / 1e6:.1f} MB of rows in all; each holds {held} MB, has grown by "
              f"{grown} MB; step {max(one['ms'] for one in found):.2f} ms", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
