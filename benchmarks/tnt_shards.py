"""Training speed of TNT beside the memory whose chunks are as short, both as one layer, in one run.

    python benchmarks/tnt_shards.py                                                            # on a CPU, toy size
    python benchmarks/tnt_shards.py --device cuda --tokens 4096 --hidden 512 --heads 8 --global-chunk 4096 --shard 256

Forward and backward pass of the layer alone, float32 (with TF32 where `--tf32`). Repetitions alternate between the two;
printed are median tokens per second, and the median, least and greatest ratio of pairs of neighbours, with the device.
Both update their local memories every `--chunk` tokens; TNT adds a global memory, which TitansLMM has not. TitansLMM
takes tokens / chunk steps in turn, TNT shard / chunk + tokens / global chunk: what it can gain is their ratio, at most
the number of shards, printed as `steps in turn`. Two shards (`--shard` half of `--tokens`) can gain no more than 2.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from clplat.architectures.associative_memory.presets import TitansLMM
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.tnt import TNT


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """One forward and backward pass."""
    reading = Reading(
        positions=torch.arange(x.shape[1], device=x.device), mask=None, documents=None,
        lengths=torch.zeros(len(x), dtype=torch.long, device=x.device),
    )  # fmt: skip
    layer.zero_grad(set_to_none=True)
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    layer(x, reading).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--global-chunk", type=int, default=1024)
    parser.add_argument("--shard", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tf32", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.manual_seed(options.seed)
    memory = TitansLMM(num_heads=options.heads, chunk=options.chunk)
    sharded = TNT(layer=memory, global_chunk=options.global_chunk, local_chunks=[options.chunk], shard=options.shard)
    layers = {
        "TitansLMM": memory.build(options.hidden).to(options.device),
        "TNT": sharded.build(options.hidden).to(options.device),
    }
    x = torch.randn(options.rows, options.tokens, options.hidden, device=options.device)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(options.repeats + 1):
        for name, layer in layers.items():
            taken = seconds(layer, x)
            if repeat:  # the first is for warming up
                times[name].append(taken)
    tokens = options.rows * options.tokens
    ratios = [plain / fast for plain, fast in zip(times["TitansLMM"], times["TNT"])]
    device = torch.cuda.get_device_name() if x.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {device}; {vars(options)}")
    for name, taken in times.items():
        print(f"{name}: {tokens / statistics.median(taken):.0f} tokens/s (median of {len(taken)})")
    plain = options.tokens / options.chunk
    in_turn = min(options.shard, options.tokens) / options.chunk + options.tokens / options.global_chunk
    print(f"steps in turn: {plain:.0f} and {in_turn:.0f}, {plain / in_turn:.1f} times fewer")
    print(f"TNT / TitansLMM: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
