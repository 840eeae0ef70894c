"""Recall of a few pairs in short rows: how soon a kind of memory learns to write and to read, on a CPU in a minute.

    python benchmarks/memory_recall.py --layer titans --max-rate 1 --seed 0
    python benchmarks/memory_recall.py --layer gated-deltanet
    python benchmarks/memory_recall.py --layer hope --depth 1 --target value

Rows are as those of the stream `MQAR`: pairs, then random tokens among which each key is asked for once. Two layers, 32
wide. Prints accuracy in a batch and its loss every 100 steps. Results: docs/memories.md, docs/hope.md.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.presets import GatedDeltaNet, LayerKind, LinearAttention, TitansLMM
from clplat.architectures.hope.presets import SelfModifyingTitans
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch

PAIRS, LENGTH, VOCABULARY, ROWS = 4, 32, 64, 64


def drawn(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (B, T) and what is asked for in them, IGNORE elsewhere."""
    half, front = VOCABULARY // 2, 2 * PAIRS
    keys = torch.rand(ROWS, half - 1, generator=generator).argsort(1)[:, :PAIRS] + 1
    values = torch.randint(half, VOCABULARY, (ROWS, PAIRS), generator=generator)
    inputs = torch.randint(half, VOCABULARY, (ROWS, LENGTH), generator=generator)
    inputs[:, 0:front:2], inputs[:, 1:front:2] = keys, values
    places = torch.rand(ROWS, LENGTH - front, generator=generator).argsort(1)[:, :PAIRS] + front
    return inputs.scatter_(1, places, keys), torch.full_like(inputs, IGNORE).scatter_(1, places, values)


def layer(given: argparse.Namespace) -> LayerKind:
    """The kind of layer that was asked for."""
    if given.layer == "titans":
        return TitansLMM(
            num_heads=2, max_rate=given.max_rate, residual=given.residual, chunk=given.chunk, depth=given.depth
        )
    if given.layer == "hope":
        return SelfModifyingTitans(
            num_heads=2,
            max_rate=given.max_rate,
            chunk=given.chunk,
            generator_chunk=given.chunk,
            depth=given.depth,
            target=given.target,
            inputs=given.inputs,
        )
    return GatedDeltaNet(num_heads=2) if given.layer == "gated-deltanet" else LinearAttention(num_heads=2, conv_width=4)


def main() -> None:
    """Train, and say how far it is now and then."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layer", choices=["titans", "hope", "gated-deltanet", "linear-attention"], default="titans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--max-rate", type=float, help="of titans, default 1 / (2 chunk), and hope")
    parser.add_argument("--chunk", type=int, default=16, help="of titans and hope")
    parser.add_argument("--depth", type=int, default=2, help="of titans and hope")
    parser.add_argument("--target", choices=["self", "value"], default="self", help="of hope")
    parser.add_argument("--inputs", choices=["own", "shared"], default="own", help="of hope")
    parser.add_argument("--residual", action="store_true", help="of titans")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    spec = Spec(kind="language", input_shape=(LENGTH,), num_outputs=VOCABULARY)
    model = MemoryTransformer(
        spec=spec, hidden_size=32, layers=[layer(given)], repeat=2, tie_head=False, initial_std=0.06
    )  # fmt: skip
    generator, begun = torch.Generator().manual_seed(given.seed), time.time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 25))
    for step in range(1, given.steps + 1):
        inputs, targets = drawn(generator)
        logits = model(Batch(inputs=inputs, targets=targets)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            asked = targets != IGNORE
            right = (logits.argmax(-1) == targets)[asked].float().mean()
            print(f"{step}: accuracy {right:.2f}, loss {loss:.2f}, {time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
