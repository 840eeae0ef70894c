"""One process of the two that `test_trc2_processes.py` starts: trains a small TRC² on its half of every batch.

python trc2_replica.py RANK SIZE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from trc2_models import opened, rows, trc2

from clplat.architectures.base import StepOutcome

STEPS, ROWS = 8, 8


def trained(rank: int, size: int, setting: dict[str, object]) -> dict[str, torch.Tensor]:
    """The state after a few steps; row i of process r is row i·size + r of the whole batch."""
    torch.manual_seed(0)
    model = opened(trc2({"column.feed_forward": "dense", "thalamus.surprise": "none"} | setting)).double().train()
    model.store.used.fill_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, STEPS + 1):
        batch = rows(ROWS, seed=step).rows(slice(rank, None, size))
        output = model(batch)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        (loss.mean() + sum(output.losses.values())).backward()
        for parameter in model.parameters():
            if parameter.grad is not None and size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        optimizer.zero_grad()
        found = loss.detach().view_as(batch.targets)
        model.step_end(StepOutcome(step=step, batch=batch, output=output, row_loss=lambda found=found: found))
    return model.state_dict()


SETTINGS = {"critics": {}, "loss": {"write.signal": "nll", "hippocampus.stored": "projected"}}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save({name: trained(rank, size, setting) for name, setting in SETTINGS.items()}, folder / f"{rank}.pt")
    dist.barrier()  # one that leaves early can make the other fail at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
