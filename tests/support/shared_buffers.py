"""One process of several whose buffers are put through one script; writes what it saw. One alone is the reference.

python shared_buffers.py RANK FOLDER cpu|gpu SIZE …      # in groups of so many, one after another; the largest first
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clplat.objective import Objective
from clplat.strategies import world as processes
from clplat.strategies.buffers import Buffer, Policy
from clplat.strategies.nearest_mean import NearestMean
from clplat.strategies.replay import ExperienceReplay
from clplat.strategies.ring_reservoir import RingReservoir
from clplat.strategies.toy_run import ToyRun
from clplat.strategies.world import World
from clplat.streams.batch import Batch

CAPACITY, STEPS, MIDDLE, DRAWN = 11, 12, 6, 12
POLICIES: tuple[Policy, ...] = ("reservoir", "ring", "class_balanced", "ring_reservoir")
CASES: dict[str, tuple[Policy, str | None]] = {
    f"{policy}{' tracked' * bool(tracks)}": (policy, tracks) for policy in POLICIES for tracks in (None, "slot:me")
}
ROW_BYTES = 3 * 4 + 4 + 4 + 5 * 4 + 5 + 2 * 2 + 8 + 2
"""Of `rows`, with integers as int32."""


def rows(numbers: Tensor, device: torch.device) -> Batch:
    """Rows of every type of number with any bits at all: NaN of all kinds, infinities, -0.0, subnormal numbers."""
    source, count = torch.Generator().manual_seed(7), 200
    bits = torch.randint(-(2**63), 2**63 - 1, (count, 8), generator=source)
    bits[:, 0] = torch.tensor([-(2**63), 0x7FF0DEAD00000001, -1, 5])[torch.arange(count) % 4]
    singles, halves = bits.view(torch.int32), bits.view(torch.int16)
    tensors = {
        "inputs": singles[:, 3:6].contiguous().view(torch.float32),
        "targets": torch.arange(count) % 4,
        "task": torch.arange(count) // 30,
        "segment_ids": singles[:, :5].long(),
        "answer": bits[:, 1:6] > 0,
        "extra.brain": halves[:, 7:9].contiguous().view(torch.bfloat16),
        "extra.double": bits[:, 0].contiguous().view(torch.float64),
        "extra.half": halves[:, 11].contiguous().view(torch.float16),
    }
    return Batch.from_tensors({name: tensor[numbers] for name, tensor in tensors.items()}).to(device)


def new_buffer(case: str, world: World) -> Buffer:
    (policy, tracks), generator = CASES[case], torch.Generator().manual_seed(3)
    if policy == "ring_reservoir":
        return RingReservoir(capacity=CAPACITY, ring_share=0.4, generator=generator, world=world, tracks=tracks)
    return Buffer(capacity=CAPACITY, policy=policy, generator=generator, world=world, tracks=tracks)


def taken_through(buffer: Buffer, steps: range, device: torch.device) -> list[dict[str, Tensor]]:
    """What a buffer gives this process in some steps of adding, drawing, and measuring what was drawn."""
    own, found = slice(buffer.world.rank, None, buffer.world.size), []
    for step in steps:
        # Of twelve rows more than the ring of four holds, which come behind each other in one batch.
        numbers = torch.arange(12 * step, 12 * step + (12 if step % 3 == 2 else 6))[own]
        given = numbers * 7919 % 101 if step % 4 == 3 else None
        batch, stamp = rows(numbers, device), (step, step // 4)
        with unasked(device, buffer.policy):
            loss = (numbers % 13).float().to(device, non_blocking=True) if buffer.tracks else None
            priority = None if given is None else given.double().to(device, non_blocking=True)
            buffer.add(batch, priority if buffer.policy == "class_balanced" else None, loss=loss, stamp=stamp)
            draws = [buffer.draw(DRAWN // buffer.world.size, step=step + 1)]
            if not isinstance(buffer, RingReservoir):
                draws.append(buffer.draw(6 // buffer.world.size, rounds=True))
            if buffer.tracks:
                slots = torch.cat([draws[0].extra[buffer.tracks], draws[0].targets.new_zeros(1)])
                buffer.measured(slots, (slots * 31 + step) % 17 / 4)
        found += [draw.tensors() for draw in draws]
    return found


@contextmanager
def unasked(device: torch.device, policy: Policy) -> Iterator[None]:
    """Within it a GPU must not be waited for, where the policy decides from what the host has."""
    if device.type == "cuda" and policy in ("reservoir", "ring_reservoir"):
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def seen(case: str, world: World, device: torch.device, middle: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a process sees of a buffer that is filled, stopped in the middle, and gone on with from a state."""
    first = new_buffer(case, world)
    draws = taken_through(first, range(MIDDLE), device)
    stopped = {"state": first.state_dict(), "random": first.generator.get_state()}
    middle, second = middle or stopped, new_buffer(case, world)
    second.load_state_dict(middle["state"], device)
    second.generator.set_state(middle["random"])
    draws += taken_through(second, range(MIDDLE, STEPS), device)
    whole = second.batch().tensors()
    processes.PART, before = 1, processes.PART  # as a buffer that is larger than what is brought together at a time
    in_parts, state = second.batch().tensors(), second.state_dict()
    processes.PART = before
    return {
        "draws": draws, "middle": stopped, "end": {"state": state, "random": second.generator.get_state()},
        "whole": whole, "in_parts": in_parts, "part": second.batch(slice(2, 9)).tensors(),
        "every_third": second.batch(slice(1, None, 3)).tensors(), "none": second.batch(slice(4, 4)).tensors(),
        "shares": [second.share(part).tensors() for part in (slice(0, 6), slice(3, 10), slice(6, 11), slice(5, 6))],
        "data": second.data().rows.tensors(), "nbytes": second.nbytes, "rows": len(second),
        "held": sum(store.untyped_storage().nbytes() for store in second.rows.values()),
    }  # fmt: skip


def means(world: World) -> list[Tensor]:
    """The nearest means of a replay run; only the first process answers anything."""
    replay = ExperienceReplay(capacity=20, policy="class_balanced")
    run = ToyRun([replay], Objective, world=world)
    for number in range(6):
        rows = torch.arange(6) + 6 * (number % 2)
        replay.buffer.add(run.path[number // 2].train.batch(rows[world.rank :: world.size]))
    nearest = NearestMean(run.context, replay.buffer, "Replay")
    with torch.no_grad():
        nearest.prepare()
        if world.rank == 0:
            nearest.logits(run.path[0].train.batch(torch.arange(2)))
        return list(nearest.means())


def together(folder: Path, sizes: Sequence[int], accelerator: str = "cpu") -> dict[int, list[dict[str, Any]]]:
    """What each process of a group sees, by the group's size; they go on from `middle.pt`, the states of one alone."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), accelerator, *map(str, sizes)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(sizes[0])
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * sizes[0]
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", map_location="cpu", weights_only=True) for rank in range(size)]
        for size in sizes
    }


def main(rank: int, folder: Path, accelerator: str, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    gpu, device = accelerator == "gpu", torch.device("cpu")
    if gpu:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    middle = torch.load(folder / "middle.pt", weights_only=True)
    for size in [size for size in sizes if rank < size]:
        dist.init_process_group(
            "nccl" if gpu else "gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size,
            timeout=timedelta(seconds=60), device_id=device if gpu else None,
        )  # fmt: skip
        world = World.current()
        found: dict[str, Any] = {case: seen(case, world, device, middle[case]) for case in CASES}
        if not gpu:
            found["means"] = means(world)
        torch.save(found, folder / f"{size}-{rank}.pt")
        dist.barrier()  # one that leaves early can make the other fail at its end
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], [int(size) for size in sys.argv[4:]])
