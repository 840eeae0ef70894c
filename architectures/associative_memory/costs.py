"""What a memory computes for a token, in multiplications and additions of matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.kernels.newton_schulz import STEPS


def operations_per_token(rule: MemoryRule, key_size: int, shapes: Sequence[tuple[int, int, int]]) -> float:
    """Operations for layers of `shapes` (heads, inputs, outputs). For every number of a layer: 2 to ask it with the
    key, to write it, to read it, behind the first layer to send the error back, and 4 for momentum; 2 more where a
    map's last token reads for itself. Inside chunks, where queries are answered in turn: products of queries and keys
    with each other and with steps, and of momentum with decay. With a window of c, pairs before the chunk are asked and
    written again, c − 1 a chunk. Orthogonal steps write momentum alone, once a chunk made a step. Learned features
    count twice less what their weights count as: once for keys, once for queries."""
    again = 1 + (rule.window - 1) / rule.chunk
    first = 2 if rule.memory.kind == "swiglu" else 1
    total = 0.0
    for layer, (heads, inputs, outputs) in enumerate(shapes):
        passes = again * (4 + 2 * (layer >= first)) + 2
        passes += 2 / rule.chunk * (rule.mapped and rule.read == "post")
        inside = 2.0 * rule.chunk * again * (inputs + outputs) * rule.reads_in_turn
        if rule.orthogonal:
            passes, inside = passes + 2 / rule.chunk, orthogonal_operations(inputs, outputs) / rule.chunk
        elif rule.momentous:
            passes += 2 + 2 * again
        total += heads * (passes * inputs * outputs + inside)
    heads = shapes[0][0]
    total += 2.0 * heads * rule.chunk**2 * rule.momentous
    if rule.window > 1:
        total += 2.0 * heads * rule.chunk**2 * again * (1 + rule.momentous)
    if rule.feature in ("poly", "taylor") and rule.polynomial.rank and rule.polynomial.degree > 1:
        total += 2.0 * heads * rule.polynomial.degree * key_size * rule.polynomial.rank
    return total


def orthogonal_operations(inputs: int, outputs: int) -> float:
    """Of Newton-Schulz: two products with the smaller side's Gram matrix and its square, a step."""
    small, large = min(inputs, outputs), max(inputs, outputs)
    return STEPS * (4.0 * small**2 * large + 2.0 * small**3)
