"""One process of the two that `test_projection.py` starts: trains with A-GEM and writes what it ends with.

python agem_replica.py RANK FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from clplat.objective import Objective
from clplat.strategies.projection import AGEM
from clplat.strategies.toy_run import STEPS, ToyRun
from clplat.strategies.weights import flat_parameters
from clplat.strategies.world import World

if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World.current()
    strategy = AGEM(patterns_per_task=6, sample_size=4)
    run = ToyRun([strategy], Objective, world=world)

    def average(parameter: torch.Tensor) -> None:
        world.sum(parameter.grad).div_(world.size)

    for parameter in run.architecture.parameters():
        parameter.register_post_accumulate_grad_hook(average)
    run.train(STEPS)
    found = {"weights": run.weights(), "memory": strategy.state_dict(), "random": run.context.generator.get_state()}
    found["reference"] = strategy.reference_gradient(list(run.architecture.parameters()), 2)
    torch.save(found | {"end": flat_parameters(run.train().architecture).detach()}, folder / f"{rank}.pt")
    dist.barrier()  # one that leaves early can make the other fail at its end
    dist.destroy_process_group()
