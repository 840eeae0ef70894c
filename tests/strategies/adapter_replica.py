"""One process of the two that `test_adapters_in_two_processes.py` starts: trains on adapters, memories and prompts, and
writes what each run ends with.

python adapter_replica.py RANK SIZE FOLDER MODEL SUPPORT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clplat.objective import Objective
from clplat.strategies.adapter_per_task import AdapterPerTask
from clplat.strategies.base import Strategy
from clplat.strategies.distillation import LwF
from clplat.strategies.ilora import ILoRA
from clplat.strategies.locas import Locas
from clplat.strategies.olora import OLoRA
from clplat.strategies.prompts import ProgressivePrompts, PromptPool
from clplat.strategies.toy_run import ToyRun
from clplat.strategies.world import World


class Averaged(Strategy):
    """Averages gradients over processes, as DistributedDataParallel does, also those of what tasks bring."""

    def gradient(self) -> None:
        for parameter in self.context.architecture.parameters():
            if parameter.grad is not None:
                self.context.world.sum(parameter.grad).div_(self.context.world.size)


def ended(make: Callable[[], Strategy], model: Any, world: World) -> dict[str, Any]:
    run = ToyRun([Averaged(), strategy := make()], Objective, "language", world, model).train()
    return {
        "weights": run.weights(), "state": strategy.state_dict(), "generator": run.context.generator.get_state(),
        "rows": run.current.inputs,
    }  # fmt: skip


def main(rank: int, size: int, folder: Path, llama: Path, support: str) -> None:
    sys.path.append(support)
    from adapted_toys import ours, prompted, remembering

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    arms: dict[str, tuple[Callable[[], Strategy], Any]] = {
        "I-LoRA": (lambda: ILoRA(capacity=8), ours),
        "I-LoRA as meant": (lambda: ILoRA(arm="code_intent", capacity=8), ours),
        "O-LoRA": (lambda: OLoRA(norm=0.1), ours),
        "adapter per task": (AdapterPerTask, ours),
        "LwF": (LwF, ours),
        "progressive prompts": (lambda: ProgressivePrompts(length=2), partial(prompted, llama)),
        "prompt pool": (lambda: PromptPool(size=4, length=2, top_k=2, query_tokens=3), partial(prompted, llama)),
        "Locas": (Locas, remembering),
        "Locas stacked": (lambda: Locas(after_task="stack"), remembering),
    }
    found = {}
    for name, (make, model) in arms.items():
        # Other random sources on each process: what is equal afterwards did not come from them.
        torch.manual_seed(rank)
        found[name] = ended(make, model, World.current())
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # one that leaves early can make the other fail at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
