"""One process of the two that `test_two_processes.py` starts: trains the toy stream and writes what it ends with.

python replica.py RANK SIZE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clplat.objective import Objective
from clplat.strategies.buffers import Buffer
from clplat.strategies.contrastive import SCR
from clplat.strategies.controllers.contract import ControlledRun
from clplat.strategies.controllers.replay_controller import ReplayController
from clplat.strategies.controllers.replay_law import ReplayLaw
from clplat.strategies.distillation import DERpp, LwF
from clplat.strategies.er_ace import ERACE
from clplat.strategies.fast_slow import FastSlow
from clplat.strategies.icarl import iCaRL
from clplat.strategies.path_integral import SI, RWalk
from clplat.strategies.projection import GEM
from clplat.strategies.regularization import MAS, OnlineEWC
from clplat.strategies.replay import ExperienceReplay, GDumb
from clplat.strategies.toy_run import ToyRun
from clplat.strategies.world import World
from clplat.streams.batch import Batch


def synchronised(run: ToyRun) -> ToyRun:
    """Average gradients over processes, as DistributedDataParallel does."""

    def average(parameter: torch.Tensor) -> None:
        run.context.world.sum(parameter.grad).div_(run.context.world.size)

    for parameter in run.architecture.parameters():
        parameter.register_post_accumulate_grad_hook(average)
    return run


def times_kept(world: World, streams: int) -> torch.Tensor:
    """How often each of 24 rows, half of them seen by each process, was in a reservoir of 6 at the end."""
    generator, counts = torch.Generator().manual_seed(5), torch.zeros(24)
    mine = torch.arange(24).view(3, -1, world.size)[:, :, world.rank]
    for _ in range(streams):
        buffer = Buffer(capacity=6, policy="reservoir", generator=generator, world=world)
        for rows in mine:
            buffer.add(Batch(inputs=rows, targets=rows))
        counts[buffer.batch().inputs] += 1
    return counts


def controlled(world: World) -> dict[str, Any]:
    """What a controlled run on both processes ends with."""
    replay = ExperienceReplay(capacity=9, policy="ring_reservoir", ring_share=0.4, from_task=1)
    law = ReplayLaw(smoothing=0.0, gain=5.0, target=0.0, base_ratio=0.5, base_weight=0.5)
    strategies = {"replay": replay, "controller": ReplayController(every=1, law=law)}
    run = ControlledRun(strategies, Objective, "language", world)
    synchronised(run).train()
    states = {name: strategy.state_dict() for name, strategy in strategies.items()}
    return {"states": states, "decisions": [list(row) for row in run.decisions], "weights": run.weights()}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    world = World.current()
    replay = ExperienceReplay(capacity=9, policy="class_balanced")
    strategies = [ExperienceReplay(capacity=9, ratio=0.5), replay, DERpp(capacity=9), OnlineEWC(strength=2.0),
                  GEM(patterns_per_task=6)]  # fmt: skip
    strategies = [ExperienceReplay(capacity=9, ratio=0.5), replay, DERpp(capacity=9), OnlineEWC(strength=2.0)]
    strategies += [MAS(strength=0.01), SI(strength=0.1), RWalk(strength=0.1, interval=2), LwF()]
    run = synchronised(ToyRun(strategies, Objective, world=world)).train()
    alone = [ERACE(capacity=9), SCR(capacity=9), iCaRL(capacity=9), GDumb(capacity=9), FastSlow(episodes=3)]
    for strategy in alone:
        synchronised(ToyRun([strategy], Objective, world=world)).train()
    torch.save(
        {
            "strategies": [strategy.state_dict() for strategy in strategies],
            "alone": [strategy.state_dict() for strategy in alone],
            "ends": [strategy.context.architecture.state_dict() for strategy in alone],
            "controlled": controlled(world),
            "generator": run.context.generator.get_state(),
            "weights": run.weights(),
            "mixed": run.mixed.inputs,
            "times_kept": times_kept(world, 600),
            "bools": world.gather(torch.tensor([[rank == 0], [True]])),
        },
        folder / f"{rank}.pt",
    )
    dist.barrier()  # one that leaves early can make the other fail at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
