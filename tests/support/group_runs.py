"""One process of a group that carries out many runs, so that a process start is paid for once; writes what each saw.

python group_runs.py RANK SIZE FOLDER cpu|gpu      # the runs are the folders NAME/run of FOLDER that have a config.yaml
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from studies import run_folder
from torch.distributed.tensor import DTensor

from clplat.config import load_run
from clplat.errors import Interrupted
from clplat.interruption import Interruption
from clplat.journal import Journal
from clplat.loop import Run
from clplat.progress import Silent
from clplat.strategies.world import World

SECONDS = 60
"""How long a process waits for another that has left the way."""


def ended(
    parent: Path, cases: Mapping[str, Mapping[str, Any]], size: int = 2, accelerator: str = "cpu"
) -> list[dict[str, Any]]:
    """What each process ended with, by case: studies, carried out by one group of `size` processes."""
    given = {"devices": size, "accelerator": accelerator}
    for name, data in cases.items():
        run_folder(parent / name, {**data, "training": data["training"] | given})
    return finished(parent, size, accelerator)


def finished(parent: Path, size: int, accelerator: str = "cpu") -> list[dict[str, Any]]:
    """What each process of a group ended with, of the run folders that are there."""
    # As `processes.spawn` has it: without ranks in the environment Lightning would start further processes.
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size), str(parent), accelerator],
            env=os.environ | {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    codes = [process.wait(timeout=1200) for process in running]
    assert codes == [0] * size, codes
    return [torch.load(parent / f"{rank}.pt", map_location="cpu", weights_only=True) for rank in range(size)]


def carried_out(folder: Path, rank: int) -> dict[str, Any]:
    """A run as a rank of the group sees it, and a last evaluation that this process does alone. A run called
    `stopped…` is stopped at its fourth optimizer step, inside a task, and resumed from its checkpoint; one called
    `left…` is left at its ninth, when the first process alone is asked to stop."""
    if folder.parent.name.startswith("left"):
        return {"held": stop_at_step(folder, rank, 9, asked=rank == 0)}
    held = stop_at_step(folder, rank, 4) if folder.parent.name.startswith("stopped") else 0
    run = started(folder, rank)
    table, model, hooks = run.execute(), run.parts.architecture, run.parts.hooks
    run.parts.evaluator.world = World()
    return {
        "rows": [[asdict(cell) for cell in table.cells(row)] for row in table.rows()],
        "last": [asdict(cell) for cell in table.cells(table.rows()[-1])],
        "alone": [asdict(cell) for cell in run.parts.evaluator.cells(run.seen)],
        "weights": {name: tensor.detach().clone() for name, tensor in model.named_parameters()},
        "buffers": {name: tensor.clone() for name, tensor in model.named_buffers()},
        "held": held,
        "carried": run.parts.learner.carried,
        "strategies": hooks.state_dict(),
        "random": run.parts.context.generator.get_state(),
        "replay": [len(s.buffer) for s in hooks.strategies.values() if hasattr(s, "buffer")],
    }


def started(folder: Path, rank: int) -> Run:
    journal, config = None if rank else Journal(folder), load_run(folder / "config.yaml")
    return Run(config, folder, journal=journal, interruption=Interruption(), progress=Silent())


def stop_at_step(folder: Path, rank: int, step: int, asked: bool = True) -> int:
    """The entries of weights, and of what an optimizer keeps of them, that this process then has."""
    run = started(folder, rank)
    finished = run.parts.learner.batch_done

    def batch_done() -> None:
        if asked and run.parts.learner.global_steps == step - 1:
            run.interruption.requested = "SIGTERM"
        finished()

    object.__setattr__(run.parts.learner, "batch_done", batch_done)
    try:
        run.execute()
    except Interrupted:
        assert run.parts.learner.global_steps == step and run.phase == "train"
    else:
        raise AssertionError("was not stopped")
    optimizer = run.parts.learner.optimizer()
    kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    tensors = [*run.parts.learner.architecture.parameters(), *kept]
    return sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in tensors)


def main(rank: int, size: int, folder: Path, accelerator: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if accelerator == "gpu" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=size,
        timeout=timedelta(seconds=SECONDS), device_id=device,
    )  # fmt: skip
    found = {
        path.parent.parent.name: carried_out(path.parent, rank) for path in sorted(folder.glob("*/run/config.yaml"))
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # one that leaves early can make the other fail at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
