"""Parity at unseen lengths: one layer each of Hope's memories, linear attention and gated delta rules.

    python benchmarks/hope_parity.py --layer hope-double --seed 0

Rows of random bits with the parity so far as the answer to each, trained at 16 tokens and tested at longer rows.
Prints accuracy over all answers and over last ones. Results: docs/results/hope.md.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from clplat.architectures.associative_memory.presets import GatedDeltaNet, LayerKind, LinearAttention
from clplat.architectures.associative_memory.rule import NetworkOptions
from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.architectures.hope.presets import SelfModifyingLayer
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

LENGTH, ROWS, TESTED = 16, 64, (16, 32, 64, 128)


def matrices(delta: str, max_rate: float | None = None) -> SelfModifyingLayer:
    """Matrix memories, written and read token by token."""
    options = SelfModifyingOptions(
        network=NetworkOptions(), momentum=False, chunk=1, generator_chunk=1, read="after", delta=delta,
        max_rate=max_rate, inputs="shared",
    )  # fmt: skip
    return SelfModifyingLayer(num_heads=2, options=options)


LAYERS: dict[str, LayerKind] = {
    "hope-double": matrices("double"),
    "hope-single": matrices("single"),
    "hope-single-2": matrices("single", max_rate=2.0),
    "hope-none": matrices("none"),
    "linear-attention": LinearAttention(num_heads=2, conv_width=4),
    "gated-deltanet": GatedDeltaNet(num_heads=2),
}


def drawn(rows: int, length: int, draw: torch.Generator) -> Batch:
    """Bits as tokens 2 and 3, and the parity so far, 0 or 1."""
    bits = torch.randint(2, (rows, length), generator=draw)
    return Batch(inputs=bits + 2, targets=bits.cumsum(1) % 2, task=torch.zeros(rows, dtype=torch.long))


@torch.no_grad()
def accuracy(model: MemoryTransformer, length: int) -> tuple[float, float]:
    """Over all answers of 200 rows, and over their last ones."""
    batch = drawn(200, length, torch.Generator().manual_seed(10_000 + length))
    right = (model(batch).logits[..., :2].argmax(-1) == batch.targets).float()
    return round(float(right.mean()), 3), round(float(right[:, -1].mean()), 3)


def main() -> None:
    """Train until all answers are right or the steps are over."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layer", choices=list(LAYERS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    spec = Spec(kind="language", input_shape=(LENGTH,), num_outputs=4)
    model = MemoryTransformer(
        spec=spec, hidden_size=32, layers=[LAYERS[given.layer]], mlp_ratio=2.0, initial_std=0.1
    )  # fmt: skip
    draw, begun, step = torch.Generator().manual_seed(given.seed), time.time(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    for step in range(1, given.steps + 1):
        batch = drawn(ROWS, LENGTH, draw)
        loss = F.cross_entropy(model(batch).logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 and accuracy(model, LENGTH)[0] > 0.999:
            break
    print(given.layer, given.seed, f"steps {step}", {length: accuracy(model, length) for length in TESTED},
          f"{time.time() - begun:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
