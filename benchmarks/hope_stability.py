"""How far answers and weights of untrained self-modifying memories go over 1024 tokens, at the largest steps.

    python benchmarks/hope_stability.py [--unbounded] [--summed]

`--unbounded` takes `max_gradient` away, `--summed` the averaging of momentum. A line for each memory, delta, momentum
and chunk: the largest number on one repeated token, and on random ones, of answers and of weights.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from clplat.architectures.associative_memory.rule import NetworkOptions
from clplat.architectures.hope.inputs import HeadInputs
from clplat.architectures.hope.memory import SelfModifyingMemory
from clplat.architectures.hope.options import SelfModifyingOptions

TOKENS, HEADS, WIDTH = 1024, 2, 16
NETWORKS = {"matrix": NetworkOptions(), "mlp": NetworkOptions(depth=2, expand=4, residual=True)}


@torch.no_grad()
def largest(options: SelfModifyingOptions, same: bool, bias: float) -> tuple[float, float]:
    """The largest number of the answers and of the weights behind them; `bias` is that of the step sizes' gate."""
    torch.manual_seed(0)
    memory = SelfModifyingMemory(options=options, num_heads=HEADS, head_size=WIDTH)
    memory.biases["rate"].fill_(bias)
    shape = (1, HEADS, 1 if same else TOKENS, WIDTH)
    x, query = (torch.randn(shape).expand(1, HEADS, TOKENS, WIDTH) for _ in range(2))
    momentum = torch.full((1, HEADS, TOKENS), 2.2) if options.momentum else None
    answers, end = memory(HeadInputs(x, query, None, None, None, None, momentum))
    return float(answers.abs().max()), max(float(weight.abs().max()) for weight in end.weights)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--unbounded", action="store_true")
    parser.add_argument("--summed", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, delta, momentum, chunk in itertools.product(
        NETWORKS, ("double", "single", "none"), (False, True), (1, 4, 16)
    ):
        options = SelfModifyingOptions(
            network=NETWORKS[name], delta=delta, momentum=momentum, chunk=chunk, generator_chunk=chunk,
            max_gradient=None if given.unbounded else 1.0, damped=not given.summed, inputs="shared",
        )  # fmt: skip
        found = [largest(options, same, bias) for same in (True, False) for bias in (0.0, 20.0)]
        print(name, delta, "momentum" if momentum else "-", chunk, *(f"{a:.1e}/{w:.1e}" for a, w in found), flush=True)


if __name__ == "__main__":
    main()
